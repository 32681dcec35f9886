"""Eight bits: the images on which the ranges of all maps are measured, and what stays in floating point."""

import difflib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import cv2
import numpy as np
from torch import nn

from ..models.deployable import Deployable
from ..utils.errors import UserError
from ..utils.images import IMAGE_SUFFIXES, read_image
from .capture import LEAST, STRIDE

NUMBER = 200
"""Images to calibrate with, at most."""

ENOUGH = 100
"""With fewer than these, the table says that they are few."""

SEED = 0
"""Of the order in which images are taken: the same images give the same result."""

WRAPPERS = ('segmentor.', 'model.')
"""What may stand before the name of a module, where a network is captured inside of another module."""


@dataclass(frozen=True)
class Calibration:
    """What a network in 8 bits is given. To iterate over it gives the inputs of the network, each (1, 3, H, W).

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
        parts = _without_wrapper(module).split('.')
        names = ['.'.join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(fnmatchcase(name, pattern) for name in names for pattern in self.keep_float)


def choose_images(images: Sequence[Path], place: str) -> tuple[str, list[Path]]:
    """At most :data:`NUMBER` of them, the same every time, and what they are for a person to read."""
    shuffled = list(images)
    random.Random(SEED).shuffle(shuffled)
    chosen = shuffled[:NUMBER]
    return f'{len(chosen)} of {len(shuffled)} images of {place}', chosen


def images_in(folder: Path) -> list[Path]:
    """Everything called like an image, in a folder and those in it.

    Raises:
        UserError: there is none, or no such folder.
    """
    if not folder.is_dir():
        raise UserError(f'--calibrate takes a folder of images; {folder} is none.')
    images = sorted(path for path in folder.rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f'{folder} holds no images to calibrate with; some hundred are best.')
    return images


def check_patterns(network: nn.Module, patterns: Sequence[str]) -> None:
    """Make sure that each pattern fits a module.

    Raises:
        UserError: with the names that are nearest to one that fits none.
    """
    names = [_without_wrapper(name) for name, _ in network.named_modules()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = ', '.join(difflib.get_close_matches(pattern, names, cutoff=0.3))
            raise UserError(f'--keep-float {pattern}: no module of the network is called so. The nearest: {near}')


def _without_wrapper(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper)
    return name


def calibrate(model: Deployable, folder: str, keep_float: Sequence[str]) -> Calibration:
    """Return the images of a folder as inputs of a network, their short sides as long as in training.

    Args:
        model: Names its modules, and normalises.
        folder: With the folders in it.
        keep_float: Patterns of names of modules.

    Raises:
        UserError: no images, or a pattern that no module fits.
    """
    check_patterns(model, keep_float)
    named, images = choose_images(images_in(Path(folder)), folder)

    def load(path: Path) -> np.ndarray:
        image = read_image(path)
        scale = model.calibration_side / min(image.shape[:2])
        height, width = (max(round(length * scale / STRIDE) * STRIDE, LEAST) for length in image.shape[:2])
        return model.to_network(cv2.resize(image, (width, height))).numpy()

    return Calibration(named, images, load, keep_float)
