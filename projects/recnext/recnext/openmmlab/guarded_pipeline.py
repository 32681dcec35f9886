"""Runs that stop at a file that went bad under way, with its name and the reason, instead of a worker's traceback.

Every file is read once: the loaders of a pipeline read through backends of MMEngine that look at what they hand on.
"""

from collections.abc import Iterator

import mmengine.fileio as fileio
import numpy as np
from mmcv.transforms import BaseTransform, LoadAnnotations, LoadImageFromFile
from mmengine.dataset import BaseDataset, Compose
from mmengine.fileio import BaseStorageBackend, register_backend
from mmseg.datasets import BaseSegDataset

from ..utils.errors import UserError, first_line, printable
from .listing import to_all
from .sample_rules import ERROR, IGNORED, SampleRules, check_pixels, is_cut_off


class SampleError(UserError):
    """A sample that cannot be trained on or tested.

    What is raised in a worker of a dataloader, torch raises again where the run is, with the worker's traceback as the
    message. Of that only the last part is for the user.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


class _CheckingBackend(BaseStorageBackend):
    """Reads as another backend does, and refuses what is not to be loaded.

    Args:
        inner: ``backend_args`` of the other backend; None means by the path.
    """

    def __init__(self, inner: dict | None = None) -> None:
        self.inner = inner

    def get(self, filepath: str) -> bytes:
        """The content of a file.

        Raises:
            Exception: it cannot be read, or is refused.
        """
        content = fileio.get(filepath, self.inner)
        self.check(filepath, content)
        return content

    def get_text(self, filepath: str, encoding: str = 'utf-8') -> str:
        """As the other backend does; texts are not checked."""
        return fileio.get_text(filepath, encoding, self.inner)

    def check(self, path: str, content: bytes) -> None:
        """Raise if the content is not to be loaded."""
        raise NotImplementedError


@register_backend('checked_image')
class CheckedImageBackend(_CheckingBackend):
    """Refuses images that OpenCV would fill with grey."""

    def check(self, path: str, content: bytes) -> None:
        """Refuse a JPEG that lacks its end."""
        if is_cut_off(content):
            raise ValueError('truncated')


@register_backend('checked_labels')
class CheckedLabelsBackend(_CheckingBackend):
    """Refuses annotations that the loader would squeeze into something else."""

    def check(self, path: str, content: bytes) -> None:
        """See :func:`check_pixels`."""
        check_pixels(path, content)


CHECKS = {LoadImageFromFile: 'checked_image', LoadAnnotations: 'checked_labels'}
"""The backend through which each kind of loader reads."""


class GuardedPipeline:
    """A pipeline that says which file is at fault when no sample comes out of it, or one with labels of no class.

    Args:
        dataset: Whose pipeline this is; its loaders are changed in place.
    """

    def __init__(self, dataset: BaseDataset) -> None:
        self.pipeline: Compose = dataset.pipeline
        for step in _steps(self.pipeline):
            for kind, backend in CHECKS.items():
                if isinstance(step, kind) and (step.backend_args or {}).get('backend') != backend:
                    step.backend_args = dict(backend=backend, inner=step.backend_args)
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
        return (wrong or [said])[0] + to_all()


def _steps(pipeline: Compose | BaseTransform) -> Iterator[BaseTransform]:
    """All transforms of a pipeline, also inside those that hold others, such as RandomChoice and TestTimeAug."""
    for name in ('transforms', 'subroutines'):
        for step in getattr(pipeline, name, ()):
            yield step
            yield from _steps(step)
