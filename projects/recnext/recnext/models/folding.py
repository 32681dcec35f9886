"""Norms multiplied into the convolutions before them, and a convolution split in two that CPUs are faster at."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval


class DepthwisePair(nn.Module):
    """A convolution that makes two channels of each, as two depthwise ones; (N, C, H, W) to (N, 2C, H', W').

    The same values, many times as fast on a CPU: oneDNN has fast kernels for one channel of each only.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.first, self.second = (_every_second(conv, index) for index in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.channel_shuffle(torch.cat([self.first(x), self.second(x)], 1), 2)


def _every_second(conv: nn.Conv2d, first: int) -> nn.Conv2d:
    """The depthwise convolution that makes the output channels ``first``, ``first + 2``, ... of ``conv``."""
    half = copy.deepcopy(conv)
    half.out_channels = conv.in_channels
    half.weight = nn.Parameter(conv.weight.detach()[first::2].clone())
    half.bias = nn.Parameter(conv.bias.detach()[first::2].clone())
    return half


def is_foldable(norm: nn.Module) -> bool:
    """Return whether this is batch normalisation with statistics, and nothing more: a subclass may activate as well."""
    return type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward) and norm.running_mean is not None


def fold_norm(conv: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """Return one convolution that computes norm(conv(x)); ``conv`` itself where the norm is folded already.

    Composed in double precision, so that folding adds no more than the rounding of the new weights.
    """
    if isinstance(norm, nn.Identity):
        return conv
    with torch.no_grad():
        folded = fuse_conv_bn_eval(copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
    return folded.to(conv.weight.dtype)
