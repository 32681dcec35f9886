"""Whether a saved model computes what the network in PyTorch computes: the same images through both."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..openmmlab.segmentor import FastEncoderDecoder
from ..utils.errors import UserError
from ..utils.evaluation import class_iou, count_confusion, mean_of_known
from .images import Images

LARGEST_ERROR = dict(fp32=1e-3, fp16=float('inf'), compressed=float('inf'), int8=float('inf'))
"""Of a logit, relative to the largest one; where weights are rounded, labels are what counts."""

LARGEST_FEATURE_ERROR = dict(fp32=1e-3, fp16=3e-2, compressed=2e-1, int8=5e-1)
"""Of a feature, relative to the largest one."""

LEAST_AGREEMENT = dict(fp32=1.0, fp16=0.995, compressed=0.98, int8=0.95)
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
    # Pixels by truth and prediction, of PyTorch and of the file, (2, classes + 1, classes); None without annotations.
    confusions: np.ndarray | None = None

    @property
    def share(self) -> float:
        """Of the pixels, those with the same label."""
        return 1 - self.different / self.pixels

    @property
    def mious(self) -> tuple[float, float]:
        """mIoU of PyTorch and of the file, in per cent; not numbers where it is not known."""
        if self.confusions is None:
            return float('nan'), float('nan')
        network, file = (100 * mean_of_known(class_iou(confusion)) for confusion in self.confusions)
        return network, file

    def check(self, precision: str, max_drop: float = float('inf')) -> None:
        """Make sure that a model is right for its precision.

        Args:
            precision: ``'fp32'``, ``'fp16'``, ``'compressed'`` or ``'int8'``.
            max_drop: Points by which mIoU may fall, where it is known.

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
        network, file = self.mious
        if network - file > max_drop:
            raise UserError(
                f'The saved model is too coarse: mIoU falls from {network:.2f} to {file:.2f}, on {self.images}; '
                f'--max-drop allows {max_drop:g}. More images with --calibrate may help, or --keep-float for the '
                'modules that do not bear it. Nothing was written.'
            )

    def describe_miou(self) -> str:
        """mIoU of PyTorch and of the file, for a person to read."""
        if self.confusions is None:
            return 'not measured: the images have no annotations'
        network, file = self.mious
        return f'PyTorch {network:.2f}, the file {file:.2f} ({file - network:+.2f} points)'

    def __str__(self) -> str:
        said = []
        if self.error is not None:
            said.append(f'largest error {self.error:.1e} of the largest {"logit" if self.pixels else "feature"}')
        if self.pixels:
            said.append(f'{100 * self.share:.3f} % of {self.pixels} labels equal')
        return f'{", ".join(said)}, on {self.images}'


def verify(
    model: Model,
    original: FastEncoderDecoder,
    part: str,
    sizes: Sequence[tuple[int, int]],
    images: Images,
) -> Agreement:
    """Run images through a saved model and through mmseg's own operations, at each of its sizes.

    Args:
        model: ``'labels'``, ``'logits'`` or both of RGB with values from 0 to 255, or features of normalised images.
        original: As trained: in eval mode, nothing folded.
        part: ``'segmentor'`` or ``'backbone'``.
        sizes: (H, W), to which the images are stretched.
        images: As :func:`.images.find_images` gives them.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)  # what is printed is the caller's
    compare = _verify_segmentor if part == 'segmentor' else _verify_backbone
    all_sizes = [compare(model, original, size, images) for size in track(sizes, 'Verifying', console=console)]
    errors = [agreement.error for agreement in all_sizes if agreement.error is not None]
    sums = (sum(getattr(agreement, name) for agreement in all_sizes) for name in ('pixels', 'different', 'unexplained'))
    known = [agreement.confusions for agreement in all_sizes if agreement.confusions is not None]
    return Agreement(images.named, max(errors) if errors else None, *sums, sum(known) if known else None)


def inputs_of(segmentor: FastEncoderDecoder, part: str, image: np.ndarray) -> np.ndarray:
    """What an exported segmentor or backbone takes, (1, 3, H, W), of an image (H, W, 3) in BGR."""
    if part == 'segmentor':
        return np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)[None], dtype=np.float32)
    return segmentor.to_network(image[..., ::-1]).numpy()


def _verify_segmentor(model: Model, segmentor: FastEncoderDecoder, size: tuple[int, int], images: Images) -> Agreement:
    largest = largest_error = pixels = different = unexplained = 0
    known, confusions = False, []
    for index, image in enumerate(images.images):
        image = cv2.resize(image, size[::-1])
        logits, scores = _reference(segmentor, image)
        saved = model(inputs_of(segmentor, 'segmentor', image))
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
        if images.annotations:
            # At the size of the file: how its labels would be enlarged is not its own.
            truth = cv2.resize(images.annotations[index].astype(np.uint16), size[::-1], interpolation=cv2.INTER_NEAREST)
            confusions.append(_count(segmentor, truth, best, labels))
    summed = sum(confusions) if confusions else None
    return Agreement(images.named, largest_error / largest if known else None, pixels, different, unexplained, summed)


def _count(segmentor: FastEncoderDecoder, truth: np.ndarray, best: Tensor, labels: Tensor) -> np.ndarray:
    """Pixels by truth (H, W) and prediction, by PyTorch and by a file, (1, H, W) both."""
    head, truth = segmentor.decode_head, torch.from_numpy(truth.astype(np.int64))
    maps = (best, labels.clamp(0, head.num_classes - 1))
    return np.stack([count_confusion(truth, one[0], head.num_classes, head.ignore_index) for one in maps])


def _verify_backbone(model: Model, segmentor: FastEncoderDecoder, size: tuple[int, int], images: Images) -> Agreement:
    error = 0.0
    for image in images.images:
        inputs = segmentor.to_network(cv2.resize(image, size[::-1])[..., ::-1])
        saved = model(inputs.numpy())
        with torch.no_grad():
            features = segmentor.backbone(inputs)
        for index, feature in zip(segmentor.backbone.out_indices, features):
            distance = _distance(saved[f'feature_{index}'], feature)
            error = max(error, distance / float(feature.abs().max()))
    return Agreement(images.named, error)


def _distance(saved: np.ndarray, expected: Tensor) -> float:
    """Largest difference; infinite where something is not a number, or of another shape."""
    saved = torch.from_numpy(np.asarray(saved)).float()
    if saved.shape != expected.shape or not saved.isfinite().all():
        return float('inf')
    return float((saved - expected).abs().max())


@torch.no_grad()
def _reference(segmentor: FastEncoderDecoder, image: np.ndarray) -> tuple[Tensor, Tensor]:
    """The logits of the network (1, C, h, w), and as mmseg resizes them to the image, (1, C, H, W)."""
    inputs = segmentor.to_network(image[..., ::-1])
    shape = tuple(inputs.shape[2:])
    scores = segmentor.encode_decode(inputs, [dict(img_shape=shape, pad_shape=shape, ori_shape=shape)])
    return segmentor.forward_logits(inputs), scores


def _argmax(segmentor: FastEncoderDecoder, scores: Tensor) -> Tensor:
    if scores.shape[1] == 1:
        return (scores[:, 0].sigmoid() > segmentor.decode_head.threshold).long()
    return scores.argmax(1)
