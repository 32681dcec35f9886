"""Whether a saved model computes what the network in PyTorch computes: the same images through both."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample
from torch import Tensor

from ..datasets.samples.scenes import make_scene
from ..models.segmentor import FastEncoderDecoder
from ..utils.errors import UserError

NUMBER = 3
"""Images to verify with."""

LARGEST_ERROR = dict(fp32=1e-3, fp16=float('inf'), compressed=float('inf'))
"""Of a logit, relative to the largest one; where weights are rounded, labels are what counts."""

LARGEST_FEATURE_ERROR = dict(fp32=1e-3, fp16=3e-2, compressed=2e-1)
"""Of a feature, relative to the largest one."""

LEAST_AGREEMENT = dict(fp32=1.0, fp16=0.995, compressed=0.98)
"""Share of the pixels whose label must be the same; in 32 bits all but ties closer than the error."""

ROUNDING = 1e-5
"""Of a score in 32 bits, relative to the largest one, where only labels are known."""

Model = Callable[[np.ndarray], dict[str, np.ndarray]]
"""From (1, 3, H, W) in single precision to outputs by name. ``'scores'`` are what the labels are the argmax of."""


class Agreement(NamedTuple):
    """How a saved model compares with the network it was made from, over some images."""

    images: str
    error: float | None  # of a logit or feature, relative to the largest; None where only labels are known
    pixels: int = 0
    different: int = 0
    unexplained: int = 0  # of these: PyTorch's own scores of the two labels differ by more than rounding explains

    @property
    def share(self) -> float:
        """Of the pixels, those with the same label."""
        return 1 - self.different / self.pixels

    def check(self, precision: str) -> None:
        """Make sure that a model is right for its precision: ``'fp32'``, ``'fp16'`` or ``'compressed'``.

        Raises:
            UserError: with what was found and expected.
        """
        if self.error == float('inf'):
            raise UserError(
                f'The saved model gives values that are infinite or not numbers, on {self.images}: more than '
                f'{precision} can hold? --precision fp32 can. Nothing was written.'
            )
        largest = (LARGEST_ERROR if self.pixels else LARGEST_FEATURE_ERROR)[precision]
        if self.error is not None and not self.error <= largest:
            raise UserError(
                f'The saved model is wrong: it differs from PyTorch by {self.error:.1e} of the largest value, on '
                f'{self.images}; expected at most {largest:g} in {precision}. Nothing was written.'
            )
        wrong = self.unexplained if precision == 'fp32' else self.different
        if self.pixels and 1 - wrong / self.pixels < LEAST_AGREEMENT[precision]:
            raise UserError(
                f'The saved model is wrong: {100 * self.share:.3f} % of the labels are those of PyTorch, on '
                f'{self.images}; expected at least {100 * LEAST_AGREEMENT[precision]:g} % in {precision}. '
                'Nothing was written.'
            )

    def __str__(self) -> str:
        said = []
        if self.error is not None:
            said.append(f'largest error {self.error:.1e} of the largest {"logit" if self.pixels else "feature"}')
        if self.pixels:
            said.append(f'{100 * self.share:.3f} % of {self.pixels} labels equal')
        return f'{", ".join(said)}, on {self.images}'


def find_images(cfg: Config, paths: Sequence[str] | None) -> tuple[str, list[np.ndarray]]:
    """Images to verify with, as cv2 reads them, (H, W, 3) in BGR, and a word on where they are from.

    Args:
        cfg: Its test set is taken where there are no paths and it is there; otherwise scenes are drawn.
        paths: Image files.

    Raises:
        UserError: a file that is no image.
    """
    if not paths:
        paths = _test_images(cfg)
    if not paths:
        return f'{NUMBER} drawn scenes', [make_scene(seed)[0][..., ::-1].copy() for seed in range(NUMBER)]
    images = [cv2.imread(str(path), cv2.IMREAD_COLOR) if Path(path).is_file() else None for path in paths]
    unreadable = [str(path) for path, image in zip(paths, images) if image is None]
    if unreadable:
        raise UserError(f'Not an image: {", ".join(unreadable)}')
    return f'{len(images)} images ({Path(paths[0]).name}{", ..." if len(images) > 1 else ""})', images


def _test_images(cfg: Config) -> list[str]:
    init_default_scope('mmseg')
    try:
        dataset = DATASETS.build({**cfg.test_dataloader.dataset, 'pipeline': [], 'lazy_init': False})
        return [dataset.get_data_info(index)['img_path'] for index in range(min(NUMBER, len(dataset)))]
    except (OSError, ValueError):  # mmengine's, for a list of nothing
        return []


def verify(
    model: Model,
    original: FastEncoderDecoder,
    part: str,
    sizes: Sequence[tuple[int, int]],
    images: Sequence[np.ndarray],
    named: str,
) -> Agreement:
    """Run images through a saved model and through mmseg's own operations, at each of its sizes.

    Args:
        model: ``'labels'``, ``'logits'`` or both of RGB with values from 0 to 255, or features of normalised images.
        original: As trained: in eval mode, nothing folded.
        part: ``'segmentor'`` or ``'backbone'``.
        sizes: (H, W), to which the images are stretched.
        images: As :func:`find_images` gives them.
        named: What they are.
    """
    from rich.progress import track

    compare = _verify_segmentor if part == 'segmentor' else _verify_backbone
    all_sizes = [compare(model, original, size, images, named) for size in track(sizes, 'Verifying')]
    errors = [agreement.error for agreement in all_sizes if agreement.error is not None]
    sums = (sum(getattr(agreement, name) for agreement in all_sizes) for name in ('pixels', 'different', 'unexplained'))
    return Agreement(named, max(errors) if errors else None, *sums)


def _verify_segmentor(
    model: Model, segmentor: FastEncoderDecoder, size: tuple[int, int], images: Sequence[np.ndarray], named: str
) -> Agreement:
    largest = largest_error = pixels = different = unexplained = 0
    known = False
    for image in images:
        image = cv2.resize(image, size[::-1])
        logits, scores = _reference(segmentor, image)
        saved = model(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)[None], dtype=np.float32))
        error = 0.0
        for name, expected in (('logits', logits), ('scores', scores)):
            if name in saved:
                known = True
                error = max(error, _distance(saved[name], expected))
                largest = max(largest, float(expected.abs().max()))
        largest_error = max(largest_error, error)
        labels = saved.get('labels')
        if labels is None:
            resized = F.interpolate(
                torch.from_numpy(saved['logits']).float(), size, mode='bilinear', align_corners=segmentor.align_corners
            )
            labels = _argmax(segmentor, resized).numpy()
        best = _argmax(segmentor, scores)
        labels = torch.from_numpy(np.asarray(labels)).long().reshape(best.shape)
        wrong = labels != best
        margins = scores.amax(1)[wrong] - scores.gather(1, labels.clamp(0, scores.shape[1] - 1)[:, None])[:, 0][wrong]
        pixels += labels.numel()
        different += int(wrong.sum())
        tolerance = 2 * error if known else ROUNDING * float(scores.abs().max())
        unexplained += int((margins > tolerance).sum()) if scores.shape[1] > 1 else int(wrong.sum())
    return Agreement(named, largest_error / largest if known else None, pixels, different, unexplained)


def _verify_backbone(
    model: Model, segmentor: FastEncoderDecoder, size: tuple[int, int], images: Sequence[np.ndarray], named: str
) -> Agreement:
    error = 0.0
    for image in images:
        inputs = _preprocess(segmentor, cv2.resize(image, size[::-1]))
        saved = model(inputs.numpy())
        with torch.no_grad():
            features = segmentor.backbone(inputs)
        for index, feature in zip(segmentor.backbone.out_indices, features):
            distance = _distance(saved[f'feature_{index}'], feature)
            error = max(error, distance / float(feature.abs().max()))
    return Agreement(named, error)


def _distance(saved: np.ndarray, expected: Tensor) -> float:
    """Largest difference; infinite where something is not a number, or of another shape."""
    saved = torch.from_numpy(np.asarray(saved)).float()
    if saved.shape != expected.shape or not saved.isfinite().all():
        return float('inf')
    return float((saved - expected).abs().max())


def _preprocess(segmentor: FastEncoderDecoder, image: np.ndarray) -> Tensor:
    """What mmseg makes of an image (H, W, 3) in BGR before the network sees it: (1, 3, H, W)."""
    inputs = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return segmentor.data_preprocessor(dict(inputs=[inputs], data_samples=[SegDataSample()]))['inputs']


@torch.no_grad()
def _reference(segmentor: FastEncoderDecoder, image: np.ndarray) -> tuple[Tensor, Tensor]:
    """The logits of the network (1, C, h, w), and as mmseg resizes them to the image, (1, C, H, W)."""
    inputs = _preprocess(segmentor, image)
    shape = tuple(inputs.shape[2:])
    scores = segmentor.encode_decode(inputs, [dict(img_shape=shape, pad_shape=shape, ori_shape=shape)])
    return segmentor.network(inputs), scores


def _argmax(segmentor: FastEncoderDecoder, scores: Tensor) -> Tensor:
    if scores.shape[1] == 1:
        return (scores[:, 0].sigmoid() > segmentor.decode_head.threshold).long()
    return scores.argmax(1)
