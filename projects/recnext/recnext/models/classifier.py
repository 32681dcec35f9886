"""The classification head of the released ImageNet networks, without which framework it is used in."""

import re

import torch
from torch import Tensor, nn

from ..utils.errors import UserError
from .folding import is_foldable

CLASS_TENSORS = re.compile(r'head\.head(_dist)?\.linear\.(weight|bias)')
"""The names of the tensors with one row a class, in every network that calls a :class:`TwoBranchHead` its ``head``."""


class NormLinear(nn.Sequential):
    """Batch normalisation, then a linear layer; (N, C) to (N, classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.linear = nn.Linear(channels, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one linear layer that computes the same, in double precision."""
        norm = self.norm
        if not is_foldable(norm):
            raise UserError(f'Only batch normalisation can be folded into a linear layer; found {type(norm).__name__}.')
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        shift = norm.bias.double() - norm.running_mean.double() * scale
        weight = self.linear.weight.double()
        return weight * scale, weight @ shift + self.linear.bias.double()


class TwoBranchHead(nn.Module):
    """Pooled features (N, C) to the mean of two branches (N, classes).

    After training with a teacher, one branch has learnt from the labels and the other from the teacher.

    Args:
        channels: C.
        num_classes: Classes of both branches.
        others: For the class that this is mixed into.
    """

    def __init__(self, channels: int, num_classes: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        # Whether training gets both branches, each (N, classes), instead of their mean.
        self.distilled_training = False
        self.head: nn.Module = NormLinear(channels, num_classes)
        self.head_dist: nn.Module | None = NormLinear(channels, num_classes)

    # Typed without the tuple of distilled training: torch.jit.script leaves that out, and goes by the annotation.
    def forward(self, x: Tensor) -> Tensor:
        if self.head_dist is None:
            return self.head(x)
        both = self.head(x), self.head_dist(x)
        if self.training and self.distilled_training and not torch.jit.is_scripting():
            return both
        return (both[0] + both[1]) / 2

    def switch_to_deploy(self) -> None:
        """One linear layer in the place of both branches and their norms. Idempotent.

        Raises:
            UserError: a norm that cannot be folded.
        """
        if self.head_dist is None:
            return
        with torch.no_grad():
            weights, biases = zip(self.head.folded(), self.head_dist.folded())
            linear = nn.Linear(*reversed(weights[0].shape)).to(self.head.linear.weight)
            linear.weight.copy_(sum(weights) / 2)
            linear.bias.copy_(sum(biases) / 2)
        self.head, self.head_dist = linear.train(self.training), None
