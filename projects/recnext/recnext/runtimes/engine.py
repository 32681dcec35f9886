"""What an engine has to bring; one class each."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.export import ExportedProgram

from .calibration import Calibration

Network = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) to logits."""


class Engine(Protocol):
    """Converts a captured graph into files, and runs what it reads back from these.

    Attributes:
        precisions: In which it runs a network, by the words of :data:`.deployment.PRECISIONS`.
        extra: Of this project, that brings them.
    """

    precisions: tuple[str, ...]
    extra: str

    def packages_for(self, precision: str) -> tuple[str, ...]:
        """What it needs, by the names in a registry of packages, which are those of the modules, too."""

    def check(self, precision: str) -> None:
        """Make sure that this machine is fit for it.

        Raises:
            UserError: it is not.
        """

    def convert(self, program: ExportedProgram, folder: Path, calibration: Calibration | None = None) -> None:
        """Write the files of a network, and nothing else, into an empty folder; in 8 bits if it is calibrated."""

    def open(self, folder: Path, precision: str) -> Network:
        """A network from its files, on as many threads as PyTorch has; to be called by one thread at a time."""
