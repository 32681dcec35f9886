"""Eight bits, in any format: the images on which the ranges of all maps are measured, and what stays as it is."""

import difflib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import cv2
import numpy as np

from ..datasets.samples.scenes import make_scene
from ..utils.errors import UserError
from ..utils.image_io import IMAGE_SUFFIXES, read_image
from .backend import ExportOptions
from .capture import Wrapper
from .images import list_samples
from .source import Source
from .verification import inputs_of

NUMBER = 200
"""Images to calibrate with, at most."""

ENOUGH = 100
"""With fewer than these, the table says that they are few."""

DRAWN = range(1000, 1032)
"""Seeds of the scenes that are drawn where there are no images; none of them is a scene to verify with."""

SEED = 0
"""Of the order in which images are taken: the same images give the same file."""


@dataclass(frozen=True)
class Calibration:
    """What a backend with 8 bits is given. To iterate over it gives the inputs of the network, each (1, 3, H, W).

    Args:
        named: What the images are, for a person to read.
        images: Files, or seeds of drawn scenes.
        load: What takes one of them to an input, in single precision.
        keep_float: Patterns of names of modules.
    """

    named: str
    images: Sequence[Path] | Sequence[int]
    load: Callable[[Path | int], np.ndarray]
    keep_float: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.load, self.images)

    def __str__(self) -> str:
        few = '' if len(self) >= ENOUGH else f'; few: {ENOUGH} or more of your own are better'
        return f'{self.named}{few}'

    def keeps(self, module: str) -> bool:
        """Whether a module stays in floating point: it, or one that it is in, has a name that fits a pattern.

        Args:
            module: Name in the network, such as ``'backbone.stem.0.conv'``, or in a wrapper around it.
        """
        parts = module.removeprefix('segmentor.').split('.')
        names = ['.'.join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.keep_float)


def find_calibration(source: Source, wrapper: Wrapper, options: ExportOptions, size: tuple[int, int]) -> Calibration:
    """The images to calibrate with: of a folder, else of the config's training set, else drawn scenes.

    Args:
        source: Its config names the training set.
        wrapper: What is exported: has the modules that may be kept in floating point.
        options: Name the folder and the modules.
        size: (H, W), to which the images are stretched.

    Raises:
        UserError: a folder without images, or a pattern that no module fits.
    """
    check_patterns(wrapper, options.keep_float)

    def load(image: Path | int) -> np.ndarray:
        pixels = make_scene(image)[0][..., ::-1] if isinstance(image, int) else read_image(image)
        resized = cv2.resize(np.ascontiguousarray(pixels), size[::-1])
        return inputs_of(source.original, options.part, resized)

    if options.calibrate is not None:
        images, place = _images_in(Path(options.calibrate)), options.calibrate
    else:
        training = source.cfg.get('train_dataloader')  # a segmentor from the hub has none
        samples = list_samples(training.dataset) if training else ()
        images = sorted(Path(sample['img_path']) for sample in samples)
        place = 'the training set'
    if not images:
        return Calibration(f'{len(DRAWN)} drawn scenes', DRAWN, load, options.keep_float)
    random.Random(SEED).shuffle(images)
    chosen = images[:NUMBER]
    return Calibration(f'{len(chosen)} of {len(images)} images of {place}', chosen, load, options.keep_float)


def check_patterns(wrapper: Wrapper, patterns: Sequence[str]) -> None:
    """Make sure that each pattern fits a module.

    Raises:
        UserError: with the names that are nearest to one that fits none.
    """
    names = [name.removeprefix('segmentor.') for name, _ in wrapper.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = ', '.join(difflib.get_close_matches(pattern, names, cutoff=0.3))
            raise UserError(f'--keep-float {pattern}: no module of the network is called so. The nearest: {near}')


def _images_in(folder: Path) -> list[Path]:
    """Everything called like an image, in a folder and those in it."""
    if not folder.is_dir():
        raise UserError(f'--calibrate takes a folder of images; {folder} is none.')
    images = sorted(path for path in folder.rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f'{folder} holds no images to calibrate with; some hundred are best.')
    return images
