"""Pictures of single objects in the layout of ImageNet, cut out of the procedural scenes: to try a classifier."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from ..utils.errors import UserError
from ..utils.files import atomic_write
from .scenes import JPEG_QUALITY, LABELS, make_scene

OBJECTS = ('bed', 'boat', 'building', 'cabinet', 'car', 'person', 'sofa', 'tree')
"""The classes, each a folder."""

SPLITS = ('train', 'val')
SIDE = 64
LEAST_AREA = 150
"""Pixels of an object in its scene; smaller ones are not shown."""

MARGIN = (1.0, 1.4)
"""The side of the cut in those of the object, at random between these."""


def write_objects(root: str | Path, training: int, validation: int, seed: int = 0) -> str:
    """Write ``train|val/<class>/*.jpg``; no scene of one split is in the other.

    Args:
        root: Folder of the dataset; it appears when it is complete.
        training: Training pictures of each class.
        validation: Validation pictures of each class.
        seed: The same seed gives the same files, to the byte.

    Returns:
        What was written.

    Raises:
        UserError: there is something at ``root`` already, or nothing can be written there.
    """
    root = Path(root)
    if root.exists():
        raise UserError(f'{root} is there already. Remove it, or choose another folder.')
    with atomic_write(root) as beside:
        for split, number in zip(SPLITS, (training, validation)):
            for name in OBJECTS:
                (beside / split / name).mkdir(parents=True)
            _write_split(beside / split, number, np.random.default_rng([seed, SPLITS.index(split)]))
    return f'{root}: {training} training and {validation} validation pictures of each of {len(OBJECTS)} classes.'


def _write_split(folder: Path, number: int, rng: Generator) -> None:
    """Draw scenes until there are enough pictures of every class."""
    from rich.progress import Progress

    written = dict.fromkeys(OBJECTS, 0)
    with Progress() as progress:
        task = progress.add_task(f'Drawing objects, {folder.name}', total=number * len(OBJECTS))
        while any(count < number for count in written.values()):
            for name, picture in cut_objects(*make_scene(int(rng.integers(2**32))), rng):
                if written[name] < number:
                    encoded = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
                    (folder / name / f'{name}_{written[name]:05d}.jpg').write_bytes(encoded.tobytes())
                    written[name] += 1
                    progress.advance(task)


def cut_objects(image: np.ndarray, labels: np.ndarray, rng: Generator) -> Iterator[tuple[str, np.ndarray]]:
    """The objects of a scene: class and a square picture (SIDE, SIDE, 3), the largest object of each class.

    Args:
        image: (H, W, 3).
        labels: (H, W), the values of :data:`scenes.LABELS`.
        rng: Decides how much around an object is shown.
    """
    for name in OBJECTS:
        _, _, boxes, _ = cv2.connectedComponentsWithStats((labels == LABELS[name]).astype(np.uint8))
        if len(boxes) < 2:  # the first is the background
            continue
        x, y, width, height, area = boxes[1:][boxes[1:, cv2.CC_STAT_AREA].argmax()]
        if area < LEAST_AREA:
            continue
        side = min(max(width, height) * rng.uniform(*MARGIN), *labels.shape)
        left = int(np.clip(x + (width - side) / 2, 0, labels.shape[1] - side))
        top = int(np.clip(y + (height - side) / 2, 0, labels.shape[0] - side))
        cut = image[top : top + int(side), left : left + int(side)]
        yield name, cv2.resize(cut, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
