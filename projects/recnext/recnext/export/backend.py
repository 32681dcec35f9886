"""What a format of files has to bring: one class each, whose steps :func:`.exporter.export` takes in order."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..utils.errors import UserError
from .capture import Wrapper
from .sizes import ImageSizes, check_sizes
from .source import Source
from .verification import Model

if TYPE_CHECKING:
    from ..runtimes.calibration import Calibration


@dataclass(frozen=True)
class ExportOptions:
    """What is exported of a network and how it is checked, in any format.

    Args:
        part: ``'segmentor'``, from pixels to labels, or ``'backbone'``, from normalised images to features.
        size: Sizes (height, width) of the images, in pixels; if None, what the format does without.
        output: Of a segmentor: ``'labels'``, ``'logits'`` or ``'both'``.
        fuse: See :meth:`.DeployableModel.switch_to_deploy`.
        verify: Compare the saved file with PyTorch.
        images: Image files to verify with; if None, of the config's test set, or drawn scenes.
        benchmark: Measure the latency on this machine.
        calibrate: Folder of images for 8 bits; if None, of the config's training set, or drawn scenes.
        keep_float: Patterns, as of a shell, of names of modules that 8 bits leave out, such as ``'decode_head.*'``.
        max_drop: Points by which mIoU may fall with 8 bits, where there are annotations to measure it.
    """

    part: str = 'segmentor'
    size: Sequence[Sequence[int]] | None = None
    output: str = 'labels'
    fuse: str = 'all'
    verify: bool = True
    images: Sequence[str] | None = None
    benchmark: bool = False
    calibrate: str | None = None
    keep_float: Sequence[str] = ()
    max_drop: float = 1.0


class Converted(Protocol):
    """A network in another format, in memory."""

    def save(self, path: str) -> None:
        """Write it, with what it says of itself."""


class SavedModel(NamedTuple):
    """A file as it was read back from disk."""

    predict: Model
    operations: Counter[str]  # by kind, without constants
    format: str  # and its version, for a person to read


class OfPrecision:
    """What follows from the precision of a backend, where nothing else decides it: see :class:`Backend`."""

    precision: str

    @property
    def tolerance(self) -> str:
        return self.precision

    @property
    def calibrated(self) -> bool:
        return self.precision == 'int8'


class OfOneSize(OfPrecision):
    """What follows for a format whose files take single images of one size: see :class:`Backend`."""

    suffix: str
    single = True

    def check(self, options: ExportOptions) -> None:
        if options.size and len(options.size) > 1:
            raise UserError(f'A {self.suffix} file has one fixed size; found several.')

    def choose_sizes(self, asked: Sequence[tuple[int, int]], source: Source) -> ImageSizes:
        sizes = asked or [source.crop_size]
        check_sizes(sizes)
        return ImageSizes(sizes)


class Backend(Protocol):
    """A format, with the options that only it has.

    Attributes:
        suffix: Of its files; empty if it writes a folder, of any name.
        single: Whether a label map is that of one image, (H, W), and not of a batch, (N, H, W).
        stored: Precision of the numbers in its files, for a person to read.
        tolerance: How closely a file must agree with PyTorch: see :meth:`.Agreement.check`.
        calibrated: Whether its maps are rounded to 8 bits, in ranges that have to be measured on images.
    """

    @property
    def suffix(self) -> str: ...

    @property
    def single(self) -> bool: ...

    @property
    def stored(self) -> str: ...

    @property
    def tolerance(self) -> str: ...

    @property
    def calibrated(self) -> bool: ...

    def check(self, options: ExportOptions) -> None:
        """Make sure, before anything is loaded, that it can be done on this machine.

        Raises:
            UserError: it cannot.
        """

    def choose_sizes(self, asked: Sequence[tuple[int, int]], source: Source) -> ImageSizes:
        """The images that the file is to take.

        Args:
            asked: Sizes (height, width) that the user names; empty if none.
            source: Its training crops have the size that counts then.

        Raises:
            UserError: it cannot take those.
        """

    def convert(
        self, wrapper: Wrapper, sizes: ImageSizes, source: Source, calibration: 'Calibration | None' = None
    ) -> Converted:
        """Capture the wrapper and convert it, together with what the file says of its source.

        Args:
            wrapper: The folded network, in eval mode, which stays as it is.
            sizes: As :meth:`choose_sizes` gives them.
            source: Where the weights are from.
            calibration: Of a backend that is :attr:`calibrated`: images of the first size, and what stays as it is.
        """

    def read(self, path: Path) -> SavedModel:
        """Read a saved file back, so that it can be run.

        Raises:
            UserError: it cannot be run here.
        """

    def measure(self, path: Path, saved: SavedModel, wrapper: Wrapper, size: tuple[int, int]) -> str:
        """A line about the latency of a file, for images of one size (height, width)."""

    def next_step(self, path: Path) -> str:
        """What to do with the file."""
