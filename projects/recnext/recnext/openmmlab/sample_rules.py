"""What can be wrong with a dataset, and how to see it in one sample: the rules that every check and run goes by."""

import copy
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from PIL import Image, UnidentifiedImageError

from ..utils.errors import UserError, printable

IGNORED = 255
"""The label of pixels that count neither in training nor in testing."""

MAX_LABELS_NAMED = 10
"""Labels or classes that one message names."""

ERROR, WARNING, NOTE = LEVELS = ('error', 'warning', 'note')


class Kind(NamedTuple):
    """A sort of finding."""

    level: str
    """``error``: a run would stop or learn something wrong. ``warning``: worth a look. ``note``: fine, but unusual."""
    title: str


KINDS = {
    'layout': Kind(ERROR, 'folders missing, empty or not as expected'),
    'loop': Kind(ERROR, 'links that lead back to where they are'),
    'no annotation': Kind(ERROR, 'images without an annotation'),
    'classes': Kind(ERROR, 'classes of dataset and network differ'),
    'numbering': Kind(ERROR, 'labels numbered in another way than the config says'),
    'unreadable': Kind(ERROR, 'files that cannot be read'),
    'channels': Kind(ERROR, 'annotations that are no map of labels'),
    'labels': Kind(ERROR, 'labels of no class'),
    '16 bits': Kind(ERROR, 'labels that do not fit in 8 bits'),
    'size': Kind(ERROR, 'image and annotation of different size'),
    'pipeline': Kind(ERROR, 'samples that the pipeline cannot prepare'),
    'batch': Kind(ERROR, 'samples that do not fit in one batch'),
    'leak': Kind(WARNING, 'the same image in training and in testing'),
    'shifted': Kind(WARNING, 'labels that are probably shifted'),
    'ignored': Kind(WARNING, 'annotations in which every pixel is ignored'),
    'absent': Kind(WARNING, 'classes that never occur'),
    'no image': Kind(WARNING, 'annotations without an image'),
    'not used': Kind(WARNING, 'images that the config does not look for'),
    'same name': Kind(WARNING, 'images of the same name, whose predictions would overwrite each other'),
    'palette': Kind(NOTE, 'palette annotations: their indices are the labels'),
    'wide labels': Kind(NOTE, 'annotations of 16 bits whose labels fit in 8'),
}
"""All sorts, in the order in which they are reported."""


class Finding(NamedTuple):
    """Something that is not as it should be."""

    kind: str
    """Key of :data:`KINDS`."""
    path: str
    """The file or folder at fault."""
    message: str
    """A sentence or more that names it."""

    @property
    def level(self) -> str:
        """See :class:`Kind`."""
        return KINDS[self.kind].level


class Sample(NamedTuple):
    """What a sample turned out to be."""

    info: dict
    """What the dataset knows of it."""
    findings: list[Finding]
    size: tuple[int, int] | None
    """Height and width of the image as the pipeline loads it; None if it cannot."""
    counts: dict[int, int]
    """Pixels of each label, as the pipeline loads them; of a classifier's image, one of its class."""
    digest: bytes
    """Of the content of the image file; empty if it cannot be read."""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong enough to stop a run."""
        return all(finding.level != ERROR for finding in self.findings)


def raise_first(findings: Iterable[Finding], advice: str = '') -> None:
    """Stop at the first error among findings.

    Raises:
        UserError: what it is, with ``advice`` behind it.
    """
    for finding in findings:
        if finding.level == ERROR:
            raise UserError(finding.message + advice)


class SampleRules:
    """The rules for one sample.

    Args:
        dataset: Config of the dataset; its pipeline says how files are loaded.
        num_classes: Of the network.
        segmentation: Whether each image has an annotation, or just a class.
    """

    def __init__(self, dataset: dict, num_classes: int, segmentation: bool) -> None:
        self.num_classes = num_classes
        self.scope = 'mmseg' if segmentation else 'mmpretrain'
        self.load_image = self._loader(dataset, 'LoadImageFromFile')
        self.load_labels = self._loader(dataset, 'LoadAnnotations') if segmentation else None

    def _loader(self, dataset: dict, kind: str) -> BaseTransform:
        """The step of the pipeline that loads images or annotations, or the usual one."""
        steps = (step for step in dataset.get('pipeline') or () if str(step.get('type')).endswith(kind))
        return TRANSFORMS.build({'type': kind, **next(steps, {}), '_scope_': self.scope})

    def __call__(self, info: dict) -> Sample:
        """Look at a sample, reading its files as training does."""
        findings, counts, digest = [], {}, b''
        try:
            digest = self._check_file(info['img_path'])
            image = self._load(self.load_image, info, 'img_path', 'img')
            if image.ndim not in (2, 3):
                raise _Refused('channels', info['img_path'], f'has {image.ndim} dimensions; expected an image.')
            size = image.shape[:2]
        except _Refused as refused:
            findings.append(refused.finding)
            size = None
        if self.load_labels is None or 'seg_map_path' not in info:
            counts = {int(info['gt_label']): 1} if 'gt_label' in info else {}
            return Sample(info, findings, size, counts, digest)
        try:
            findings += check_pixels(info['seg_map_path'], _read(info['seg_map_path']))
            labels = self._load(self.load_labels, info, 'seg_map_path', 'gt_seg_map')
            counts, more = self._check_labels(labels, info, size)
            findings += more
        except _Refused as refused:
            findings.append(refused.finding)
        return Sample(info, findings, size, counts, digest)

    @staticmethod
    def _check_file(path: str) -> bytes:
        """Digest of a file that is not empty and not cut off."""
        content = _read(path)
        if not content or is_cut_off(content):
            why = 'truncated; its end is missing' if content else 'an empty file'
            raise _Refused('unreadable', path, f'cannot be read: {why}.')
        return hashlib.blake2b(content, digest_size=16).digest()

    @staticmethod
    def _load(loader: BaseTransform, info: dict, key: str, result: str) -> np.ndarray:
        try:
            return loader(copy.deepcopy(info))[result]
        except Exception as error:  # a damaged file can fail in any way
            raise _Refused('unreadable', info[key], f'cannot be read: {_describe(error, info[key])}.') from None

    def _check_labels(
        self, labels: np.ndarray, info: dict, size: tuple[int, int] | None
    ) -> tuple[dict[int, int], list[Finding]]:
        """Counts of the labels of an annotation, and what is wrong with it."""
        path, expected = info['seg_map_path'], self._expected()
        findings = []
        if labels.ndim != 2:
            raise _Refused('channels', path, f'has {labels.shape[-1]} channels; {expected}')
        values, numbers = np.unique(labels, return_counts=True)
        counts = dict(zip(values.tolist(), numbers.tolist()))
        wrong = [label for label in counts if not 0 <= label < self.num_classes and label != IGNORED]
        if size is not None and labels.shape != size:
            message = f'{printable(path)} is {_size(labels.shape)}, and its image {printable(info["img_path"])} '
            turned = ', as its camera has noted that it is to be turned (EXIF)' if labels.T.shape == size else ''
            findings.append(Finding('size', path, f'{message}{_size(size)}{turned}.'))
        if wrong:
            shifted = ' after reduce_zero_label' if info.get('reduce_zero_label') else ''
            named = ', '.join(map(str, wrong[:MAX_LABELS_NAMED])) + (', ...' if len(wrong) > MAX_LABELS_NAMED else '')
            findings.append(Finding('labels', path, f'{printable(path)} has the labels {named}{shifted}; {expected}'))
        if set(counts) <= {IGNORED}:
            findings.append(Finding('ignored', path, f'{printable(path)} has no pixel that counts.'))
        return counts, findings

    def _expected(self) -> str:
        return (
            f'expected a PNG of one channel with labels 0 to {self.num_classes - 1}, '
            f'and {IGNORED} for what does not count.'
        )


class _Refused(Exception):
    """A file with which nothing more can be done."""

    def __init__(self, kind: str, path: str, reason: str) -> None:
        super().__init__(path)
        self.finding = Finding(kind, path, f'{printable(path)} {reason}')


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _Refused('unreadable', path, f'cannot be read: {error.strerror}.') from None


def _size(shape: tuple[int, int]) -> str:
    return f'{shape[0]} × {shape[1]} (height × width)'


def check_pixels(path: str, content: bytes) -> list[Finding]:
    """What is worth saying of the pixels in an annotation, which the loader squeezes into two dimensions and 8 bits.

    Args:
        path: Of the file, for the messages.
        content: Of the file.

    Raises:
        Exception: it is not to be loaded at all.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if 1 in image.size:
                why = 'is one pixel high or wide, which LoadAnnotations does not take. Leave it out, or pad it.'
                raise _Refused('channels', path, why)
            if image.mode == 'P':
                return [Finding('palette', path, f'{printable(path)} is a palette image.')]
            if not image.mode.startswith(('I', 'F')):
                return []
            values = np.asarray(image)
    except _Refused:
        raise
    except Exception:  # the pipeline's own loader will say why, or read it all the same
        return []
    if values.min() < 0 or values.max() > 255:
        why = f'has labels from {values.min()} to {values.max()}; LoadAnnotations keeps 8 bits only.'
        raise _Refused('16 bits', path, f'{why} Write labels below 255 in a PNG of 8 bits.')
    return [Finding('wide labels', path, f'{printable(path)} is an image of more than 8 bits ({image.mode}).')]


def _describe(error: Exception, path: str) -> str:
    """An exception of a loader, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return 'an empty file' if not Path(path).stat().st_size else 'not an image of a known format'
    if isinstance(error, AssertionError):  # LoadImageFromFile got nothing from the decoder
        return 'truncated, damaged, or not an image of a known format'
    return str(getattr(error, 'strerror', None) or error or type(error).__name__).strip().rstrip('.')


def is_cut_off(content: bytes) -> bool:
    """Whether a JPEG lacks its end; OpenCV before version 5 decodes such a one, with a grey rest."""
    if content[:2] != b'\xff\xd8':
        return False
    place = 2
    # Segments with their lengths up to the start of the scan, after which the end marker can be nothing else.
    while place + 4 <= len(content) and content[place] == 0xFF and content[place + 1] != 0xDA:
        filling = content[place + 1] == 0xFF
        place += 1 if filling else 2 + int.from_bytes(content[place + 2 : place + 4], 'big')
    return content.rfind(b'\xff\xd9', place) < 0  # from the end, where it nearly always is
