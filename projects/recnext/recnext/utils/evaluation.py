"""What an evaluation leaves behind to look at later: which class was taken for which, and the best and worst images.

:class:`.openmmlab.record.EvaluationRecord` writes it as ``evaluation.json`` beside the log of a run.
"""

import base64
import json
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .files import atomic_write

RECORD = 'evaluation.json'
"""Name of the file."""

GROUPS, MAPS = ('worst', 'best'), ('truth', 'prediction')
"""Of the examples, and of the PNGs of each."""


class Example(NamedTuple):
    """One image to look at.

    Args:
        path: Of the image.
        iou: Mean IoU of the classes in its truth, 0 to 1.
        truth: Its annotation as a PNG of the numbers of the classes, at most 640 pixels wide and high.
        prediction: The same of what was predicted.
    """

    path: str
    iou: float
    truth: bytes
    prediction: bytes

    def label_maps(self) -> tuple[np.ndarray, np.ndarray]:
        """Truth and prediction, each (H, W).

        Raises:
            UserError: what was recorded is no image.
        """
        maps = [cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED) for png in self[2:] if png]
        if len(maps) < 2 or any(labels is None or labels.ndim != 2 for labels in maps):
            raise UserError(f'The label maps recorded for {self.path} are damaged.')
        return maps[0], maps[1]


class Evaluation(NamedTuple):
    """An evaluation.

    Args:
        of: What was evaluated, in words.
        classes: Names.
        palette: RGB colours.
        confusion: (classes + 1, classes), pixels by truth and prediction; the last row is of labels of no class.
            Ignored pixels are not in it.
        images: How many there were.
        worst: The worst one first.
        best: The best one first.
    """

    of: str
    classes: list[str]
    palette: list[list[int]]
    confusion: np.ndarray
    images: int
    worst: list[Example]
    best: list[Example]

    @property
    def iou(self) -> np.ndarray:
        """(classes,), 0 to 1; not a number for a class that was neither there nor predicted."""
        return class_iou(self.confusion)

    @property
    def accuracy(self) -> np.ndarray:
        """(classes,), the share of a class's pixels that was found; not a number where it has none."""
        with np.errstate(invalid='ignore'):
            return np.diagonal(self.confusion) / self.confusion[:-1].sum(1)

    @property
    def share(self) -> np.ndarray:
        """(classes,), the share of all pixels that are of the class."""
        return self.confusion[:-1].sum(1) / max(self.confusion[:-1].sum(), 1)

    @property
    def means(self) -> dict[str, float]:
        """``aAcc``, ``mIoU`` and ``mAcc`` as IoUMetric has them: per cent, two digits."""
        whole = np.diagonal(self.confusion).sum() / max(self.confusion[:-1].sum(), 1)
        means = dict(aAcc=whole, mIoU=mean_of_known(self.iou), mAcc=mean_of_known(self.accuracy))
        return {name: round(100 * float(value), 2) for name, value in means.items()}


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """IoU of every class, (classes,), from pixels by truth and prediction, (classes + 1, classes)."""
    right = np.diagonal(confusion)
    with np.errstate(invalid='ignore'):
        return right / (confusion[:-1].sum(1) + confusion.sum(0) - right)


def mean_of_known(values: np.ndarray) -> float:
    """The mean without what is not a number; not a number itself where nothing is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float('nan')


def count_confusion(truth: Tensor, predicted: Tensor, num_classes: int, ignored: int) -> np.ndarray:
    """Pixels by truth and prediction, (classes + 1, classes); see :class:`Evaluation`.

    Args:
        truth: (H, W), integers.
        predicted: (H, W), integers from 0 to classes - 1.
        num_classes: How many there are.
        ignored: Label of the pixels that do not count.
    """
    counted = truth != ignored
    pairs = truth[counted].long().clamp(max=num_classes) * num_classes + predicted[counted].long()
    counts = torch.bincount(pairs, minlength=(num_classes + 1) * num_classes)
    return counts.view(num_classes + 1, num_classes).cpu().numpy()


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Write an evaluation as JSON, of the confusion only what is not zero.

    Raises:
        UserError: it cannot be written.
    """
    pairs = np.stack(evaluation.confusion.nonzero(), 1)
    pixels = evaluation.confusion[tuple(pairs.T)]
    content = evaluation._asdict()
    content['confusion'] = np.column_stack((pairs, pixels)).tolist()
    for group in GROUPS:
        content[group] = [
            {
                name: base64.b64encode(value).decode() if name in MAPS else value
                for name, value in example._asdict().items()
            }
            for example in content[group]
        ]
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(content))


def read_evaluation(path: Path) -> Evaluation:
    """Read what :func:`write_evaluation` wrote.

    Raises:
        UserError: the file is something else, or damaged.
    """
    try:
        content = json.loads(path.read_bytes())
        num_classes = len(content['classes'])
        confusion = np.zeros((num_classes + 1, num_classes), np.int64)
        for truth, predicted, pixels in content['confusion']:
            confusion[truth, predicted] = pixels
        for group in GROUPS:
            content[group] = [
                Example(**{name: base64.b64decode(value) if name in MAPS else value for name, value in example.items()})
                for example in content[group]
            ]
        palette = [[int(value) for value in colour] for colour in content['palette']]
        if len(palette) < num_classes or any(len(colour) != 3 for colour in palette):
            raise ValueError('a colour for each class is missing')
        classes = [str(name) for name in content['classes']]
        return Evaluation(**{**content, 'confusion': confusion, 'palette': palette, 'classes': classes})
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f'{path} cannot be read: {type(error).__name__}: {error}') from None
