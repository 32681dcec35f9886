"""Runs that stop at a file that went bad under way, with its name and the reason, instead of a worker's traceback."""

from pathlib import Path

import numpy as np
from mmengine.dataset import Compose
from mmseg.datasets import BaseSegDataset

from ..utils.errors import UserError, first_line, printable
from .listing import TO_ALL
from .sample_rules import ERROR, IGNORED, SampleRules, check_pixels, is_cut_off


class SampleError(UserError):
    """A sample that cannot be trained on or tested.

    What is raised in a worker of a dataloader, torch raises again where the run is, with the worker's traceback as the
    message. Of that only the last part is for the user.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


class GuardedPipeline:
    """A pipeline that says which file is at fault when no sample comes out of it, or one with labels of no class.

    Args:
        dataset: Whose pipeline this is.
    """

    def __init__(self, dataset: object) -> None:
        self.pipeline: Compose = dataset.pipeline
        self.num_classes = len(dataset.metainfo.get('classes') or ())
        self.segmentation = isinstance(dataset, BaseSegDataset)

    def __call__(self, info: dict) -> dict | None:
        """As the pipeline inside.

        Raises:
            SampleError: naming the file and the reason.
        """
        original = dict(info, seg_fields=[])  # transforms change it
        try:
            return self._run(info)
        except Exception as error:  # a damaged file can fail in any way
            raise SampleError(self._explain(original, error)) from None

    def _run(self, data: dict | None) -> dict | None:
        """As mmengine's Compose does, with a look at the labels when they are loaded."""
        path = Path(data.get('img_path') or '')
        if path.suffix.lower() in ('.jpg', '.jpeg') and is_cut_off(path.read_bytes()):
            raise ValueError('truncated')
        if data.get('seg_map_path'):
            check_pixels(data['seg_map_path'])
        looked = not self.segmentation
        for transform in self.pipeline.transforms:
            data = transform(data)
            if data is None:
                return None
            if not looked and 'gt_seg_map' in data:
                self._check_labels(data['gt_seg_map'], data['ori_shape'])
                looked = True
        return data

    def _check_labels(self, labels: np.ndarray, size: tuple[int, int]) -> None:
        """Refuse what the loss, or the metric, would take for other classes or other pixels."""
        if labels.shape != tuple(size):
            raise ValueError(f'labels of shape {labels.shape} for an image of {size}')
        if ((labels >= self.num_classes) & (labels != IGNORED)).any():
            raise ValueError(f'labels beyond the {self.num_classes} classes')

    def _explain(self, info: dict, error: Exception) -> str:
        """What is wrong with the files of a sample by the rules, or else what the pipeline said."""
        rules = SampleRules({}, self.num_classes, self.segmentation)
        wrong = [finding.message for finding in rules(info).findings if finding.level == ERROR]
        said = f'{printable(info.get("img_path"))} cannot be prepared: {type(error).__name__}: {first_line(error)}'
        return (wrong or [said])[0] + TO_ALL
