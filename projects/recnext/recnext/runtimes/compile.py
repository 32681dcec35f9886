"""PyTorch's own compiler as an engine, ahead of time: a library of machine code, which the next start only loads."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram

from .engine import Network

FILE = 'network.pt2'


@dataclass(frozen=True)
class CompileEngine:
    """AOTInductor on the processor, with the weights frozen: folded, and in the order that its kernels like."""

    precisions = ('fp32', 'bf16', 'fp16')
    packages = ()
    extra = ''

    def check(self, precision: str) -> None:
        """It needs a C++ compiler, and says so itself."""

    def convert(self, program: ExportedProgram, folder: Path) -> None:
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / FILE), inductor_configs=dict(freezing=True)
        )

    def open(self, folder: Path, precision: str) -> Network:
        return torch._inductor.aoti_load_package(str(folder / FILE))
