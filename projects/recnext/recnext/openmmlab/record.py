"""A record of an evaluation for ``recnext report``, beside the metric that measures it."""

import heapq
import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmseg.registry import METRICS
from torch import Tensor

from ..utils.errors import UserError
from ..utils.evaluation import Evaluation, Example, class_iou, count_confusion, mean_of_known, write_evaluation

EXAMPLES = 4
"""How many of the best images, and of the worst, are kept with their label maps."""

LONGEST_SIDE = 640
"""Of the label maps that are kept, in pixels."""


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
