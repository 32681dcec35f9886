"""A saved Core ML model, read back from disk and executed without Core ML, in the precision that it declares.

Prediction with Core ML needs macOS. This executes the operations of the file itself, with PyTorch, one after the other,
so that what was written can be compared with the network it came from on any machine. Here is what both of Core ML's
formats have: :mod:`.coreml_program` and :mod:`.coreml_network` execute them.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from google.protobuf.message import Message
from torch import Tensor

from ..utils.errors import UserError


class UnknownOperation(UserError):
    """An operation of the saved model that is not known here."""

    def __init__(self, kind: str, path: Path) -> None:
        super().__init__(f'{path} has the operation {kind}, which cannot be executed here to verify it.')


class CoreMLEvaluator:
    """Base of the two formats.

    Attributes:
        spec: The specification that was read.
        operations: Their number by type, without constants.
    """

    def __init__(self, path: Path, spec: Message) -> None:
        self.path = path
        self.spec = spec
        self.operations: Counter[str] = Counter()

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """Execute the model.

        Args:
            image: (1, 3, H, W), the values of the one input.

        Returns:
            The outputs by name; and as ``'scores'`` what the labels are the argmax of, where there is an argmax.

        Raises:
            UnknownOperation: with the name of the operation.
        """
        raise NotImplementedError


def resize_bilinear(x: Tensor, scale: tuple[float, float], align_corners: bool) -> Tensor:
    """(N, C, H, W) to (N, C, floor(scale · H), floor(scale · W)), sampled at the scale that the file gives."""
    if align_corners:
        size = [int(length * factor) for length, factor in zip(x.shape[2:], scale)]
        return F.interpolate(x, size=size, mode='bilinear', align_corners=True)
    # The interpolation of a 16-bit operation is exact up to the rounding of its result.
    return F.interpolate(x, scale_factor=scale, mode='bilinear', align_corners=False, recompute_scale_factor=False)


def resize_nearest(x: Tensor, scale: tuple[float, float]) -> Tensor:
    """(N, C, H, W) to (N, C, floor(scale · H), floor(scale · W)); pixel i is taken from floor(i / scale)."""
    for dim, factor in zip((2, 3), scale):
        length = int(x.shape[dim] * factor)
        x = x.index_select(dim, (torch.arange(length) / factor).long().clamp(max=x.shape[dim] - 1))
    return x


def resolve_zeros(shape: list[int], given: torch.Size) -> list[int]:
    """In both formats, 0 in the new shape of a reshape keeps the length that is there."""
    return [given[dim] if length == 0 else length for dim, length in enumerate(shape)]
