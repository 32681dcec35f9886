"""PyTorch's own compiler as an engine: C++ for this processor, compiled ahead of time by AOTInductor.

torch.compile does the same in every process: it keeps parts of its work, traces the network again, and compiles again
for a second size of images.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from torch import Tensor
from torch.export import ExportedProgram

from ..utils.errors import UserError
from .calibration import Calibration
from .engine import Network

FILE = 'network.pt2'

OPTIONS = {'cpp.dynamic_threads': True}
"""Of the compiler: loops run on as many threads as PyTorch has then, not on as many as it has now."""


@dataclass(frozen=True)
class InductorEngine:
    """What torch.compile makes of a network, on the processor, as a library on disk."""

    precisions = ('fp32', 'bf16')
    extra = ''

    def packages_for(self, precision: str) -> tuple[str, ...]:
        """None but PyTorch."""
        return ()

    def check(self, precision: str) -> None:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise UserError(
                'The engine compile needs a C++ compiler, and finds none here: apt-get install g++, or name another in '
                'the variable CXX.\n  --engine torch needs none.'
            ) from None

    def convert(self, program: ExportedProgram, folder: Path, calibration: Calibration | None = None) -> None:
        from torch._inductor import aoti_compile_and_package, config
        from torch._inductor.utils import fresh_inductor_cache

        options = dict(OPTIONS)
        if hasattr(config.aot_inductor, 'precompile_headers'):
            # For the next programs, which are rare: it takes longer than it saves, and stays in the temporary files.
            options['aot_inductor.precompile_headers'] = False
        # What the compilers keep for themselves, as large as the result again, goes however this ends.
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own,
            fresh_inductor_cache(dir=own),
            patch.dict(os.environ, TMPDIR=own),
        ):
            aoti_compile_and_package(program, package_path=str(folder / FILE), inductor_configs=options)

    def open(self, folder: Path, precision: str) -> Network:
        from torch._inductor import aoti_load_package

        compiled = aoti_load_package(str(folder / FILE))

        def run(images: Tensor) -> Tensor:
            # It takes for granted that images lie in memory as those did with which it was captured.
            return compiled(images.contiguous())

        return run
