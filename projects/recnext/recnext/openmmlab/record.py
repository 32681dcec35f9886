"""What an evaluation leaves behind to look at later: which class was taken for which, and the best and worst images.

mmseg's IoUMetric prints a table of classes and logs three means. :class:`EvaluationRecord` runs beside it and writes
``evaluation.json`` into the folder of the run's log, for :mod:`html_report`.
"""

import base64
import heapq
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmseg.registry import METRICS
from torch import Tensor

from ..utils.errors import UserError
from ..utils.files import atomic_write

RECORD = 'evaluation.json'
"""Name of the file."""

EXAMPLES = 4
"""How many of the best images, and of the worst, are kept with their label maps."""

LONGEST_SIDE = 640
"""Of the label maps that are kept, in pixels."""

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


@METRICS.register_module()
class EvaluationRecord(BaseMetric):
    """Writes an evaluation down, beside the metric that measures it; its own metrics are none.

    An image costs one count of its pairs of labels. Label maps are kept only while their image is among the best or
    worst that this process has seen, one more than is shown: the sampler may repeat an image at the end, so that all
    processes have as many, and mmengine drops that one afterwards.

    Args:
        path: Of the file to write.
        of: What is evaluated, in words.
        ignore_index: Label of the pixels that do not count.
        collect_device: As for every metric.
        collect_dir: As for every metric.
    """

    default_prefix = 'record'

    def __init__(
        self,
        path: str | Path,
        of: str,
        ignore_index: int = 255,
        collect_device: str = 'cpu',
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(collect_device, collect_dir=collect_dir)
        self.path = Path(path)
        self.of = of
        self.ignore_index = ignore_index
        self.worst: list[tuple[float, int]] = []
        self.best: list[tuple[float, int]] = []

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Count the pixels of a batch; as IoUMetric's."""
        num_classes = len(self.dataset_meta['classes'])
        for sample in data_samples:
            predicted, truth = (sample[key]['data'] for key in ('pred_sem_seg', 'gt_sem_seg'))
            # (1, H, W), or (H, W) after test-time augmentation
            predicted = predicted.reshape(predicted.shape[-2:])
            truth = truth.reshape(truth.shape[-2:]).to(predicted.device)
            confusion = count_confusion(truth, predicted, num_classes, self.ignore_index)
            iou = mean_of_known(class_iou(confusion)[confusion[:-1].any(1)])
            pairs = np.stack(confusion.nonzero(), 1)
            path = str(Path(sample['img_path']).absolute())
            self.results.append(dict(path=path, iou=iou, pairs=pairs, pixels=confusion[tuple(pairs.T)], maps=None))
            if not np.isnan(iou):
                self._compare(iou, (truth, predicted))

    def _compare(self, iou: float, labels: tuple[Tensor, Tensor]) -> None:
        """Keep the label maps of the newest image if it is among the best or the worst, and let go of what it beats."""
        place = len(self.results) - 1
        for heap, merit in ((self.best, iou), (self.worst, -iou)):
            heapq.heappush(heap, (merit, -place))  # of equals, the first
            beaten = -heapq.heappop(heap)[1] if len(heap) > EXAMPLES + 1 else None
            if beaten != place and self.results[place]['maps'] is None:
                self.results[place]['maps'] = tuple(map(self._encode, labels))
            if beaten is not None and all(-other != beaten for _, other in self.best + self.worst):
                self.results[beaten]['maps'] = None

    def _encode(self, labels: Tensor) -> bytes:
        labels = labels.cpu().numpy().astype(np.uint8 if len(self.dataset_meta['classes']) <= 256 else np.uint16)
        factor = LONGEST_SIDE / max(labels.shape)
        if factor < 1:
            size = [max(1, round(side * factor)) for side in labels.shape[::-1]]
            labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
        return cv2.imencode('.png', labels)[1].tobytes()

    def evaluate(self, size: int) -> dict:
        """Gather from all processes and write; as every metric's."""
        metrics = super().evaluate(size)
        self.best, self.worst = [], []
        return metrics

    def compute_metrics(self, results: list[dict]) -> dict:
        """Add up the images and write the file; there are no metrics in it."""
        num_classes = len(self.dataset_meta['classes'])
        confusion = np.zeros((num_classes + 1, num_classes), np.int64)
        for result in results:
            confusion[tuple(result['pairs'].T)] += result['pixels']
        kept = [Example(result['path'], result['iou'], *result['maps']) for result in results if result['maps']]
        ranked = sorted(kept, key=lambda example: example.iou)
        middle = min(-(-len(ranked) // 2), EXAMPLES)
        evaluation = Evaluation(
            of=self.of,
            classes=list(self.dataset_meta['classes']),
            palette=[list(map(int, colour)) for colour in self.dataset_meta['palette']],
            confusion=confusion,
            images=len(results),
            worst=ranked[:middle],
            best=sorted(ranked[middle:], key=lambda example: -example.iou)[:EXAMPLES],
        )
        try:
            write_evaluation(evaluation, self.path)
        except UserError as error:  # no reason to end a training
            print_log(f'No record of this evaluation for recnext report: {error}', 'current', logging.WARNING)
        return {}


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
