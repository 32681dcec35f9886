"""The launch scripts as a user runs them."""

import os
import re
import subprocess
import sys

from helpers.reference import ROOT
from helpers.tools import warm_python

STARTED: list[subprocess.Popen] = []


def python_of_scripts(fresh: bool) -> dict[str, str]:
    """The variables by which the scripts, and torchrun in them, choose an interpreter."""
    return dict(PYTHON=sys.executable) if fresh else dict(PYTHON=warm_python(), PYTHON_EXEC=warm_python())


def start(script: str, *args: object, fresh: bool = False, **variables: str) -> subprocess.Popen:
    """Start it; ``fresh`` as in :func:`helpers.tools.run_tool`."""
    environment = {**os.environ, **python_of_scripts(fresh)}
    environment.pop('OMP_NUM_THREADS', None)  # torchrun's processes get threads as the scripts say
    environment.update(variables)
    process = subprocess.Popen(
        ['bash', str(ROOT / 'tools' / script), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    STARTED.append(process)
    return process


def run(script: str, *args: object, fresh: bool = False, **variables: str) -> str:
    process = start(script, *args, fresh=fresh, **variables)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def metrics(said: str) -> list[str]:
    """Everything that was measured, to the last digit: the table of classes and the summary."""
    lines = said.splitlines()
    table = [line for line in lines if re.match(r'\| +\S', line)]
    return [*table, re.search(r'aAcc.*mAcc: [\d.]+', said)[0]]
