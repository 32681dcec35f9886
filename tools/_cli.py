"""What the tools share: the project on the path, whether it is installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from projects.recnext.recnext.cli.main import carry_out, run_tool

__all__ = ['carry_out', 'run_tool']
