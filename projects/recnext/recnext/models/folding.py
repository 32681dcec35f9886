"""Folding for deployment: norms into convolutions, Semantic FPN's convolutions into one another.

FPN has no norm and no activation, so everything from a feature c_i to the first activation of FPNHead is
linear (U is nearest upsampling, the head's norm stands folded in S and s)::

    l_i = L c_i + b + U l_(i+1)     lateral 1×1,  C -> M channels
    p_i = F l_i + f                 FPN 3×3,      M -> M
    h_i = act(S p_i + s)            head 3×3,     M -> D

With K = S ∘ F, a 5×5 kernel, S F l_i = (K ∘ L) c_i + (K U)(l_(i+1) + b): a 5×5 convolution C -> D of the feature, and
a 3×3 convolution M -> 4D of the map above, one D for each of the four pixels that U makes of one. The map l_i itself is
never made. It pays where a feature has few channels: see :func:`folding_saves_flops`.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

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


class FoldedKernels(NamedTuple):
    """The kernels of one folded level, in double precision.

    ``sides`` are those of the border, at the top, bottom, left and right. p_i ends where the map ends, so S sees zeros
    outside; K sees what F would make of l_i on the ring one pixel outside the map. ``ring`` takes the outermost line
    of l_i to a side of this ring, ``inwards`` takes that to the outermost line of the output, to be subtracted.
    """

    direct: Tensor  # (D, C, 5, 5), from c_i
    from_above: Tensor  # (4D, M, 3, 3), from l_(i+1) + b; channel 4d + 2y + x is pixel (y, x) of channel d
    bias: Tensor  # (D,)
    sides: tuple[tuple[Tensor, Tensor], ...]  # (ring (M, M, 1, 3), inwards (D, M, 1, 3)), or upright (..., 3, 1)


def fold_level(lateral: nn.Conv2d, fpn_conv: nn.Conv2d, head_conv: nn.Conv2d) -> FoldedKernels:
    """Compose the three convolutions of a level, L, F and S above, biases or none, into those of a folded one."""
    with torch.no_grad():
        inner, outer = fpn_conv.weight.double(), head_conv.weight.double()
        # A transposed convolution is the full convolution of two kernels: (D, M, 3, 3), (M, M, 3, 3) to (D, M, 5, 5).
        kernel = F.conv_transpose2d(outer, inner)
        # Tap d - 2 of output pixel p falls on pixel floor((p + d - 2) / 2) of the map above: -1, 0 or 1.
        taps = kernel.new_zeros(2, 3, 5)
        for p in range(2):
            for d in range(5):
                taps[p, (p + d) // 2, d] = 1
        bias = kernel.new_zeros(len(kernel))
        if fpn_conv.bias is not None:
            bias = bias + outer.sum((2, 3)) @ fpn_conv.bias.double()
        if head_conv.bias is not None:
            bias = bias + head_conv.bias.double()
        return FoldedKernels(
            direct=torch.einsum('dmyx,mc->dcyx', kernel, lateral.weight.double().flatten(1)),
            from_above=torch.einsum('dmyx,pay,qbx->dpqmab', kernel, taps, taps).flatten(0, 2),
            bias=bias,
            sides=(
                (inner[:, :, 2:], outer[:, :, :1]),
                (inner[:, :, :1], outer[:, :, 2:]),
                (inner[..., 2:], outer[..., :1]),
                (inner[..., :1], outer[..., 2:]),
            ),
        )


def folding_saves_flops(in_channels: int, fpn_channels: int, head_channels: int, lowest: bool = True) -> bool:
    """Return whether a level takes fewer multiply-adds per pixel when it is folded.

    Only the lowest level is spared its lateral map: the others make it for the level below.
    """
    lateral = in_channels * fpn_channels
    plain = lateral + 9 * fpn_channels * fpn_channels + 9 * fpn_channels * head_channels
    folded = 25 * in_channels * head_channels + 9 * fpn_channels * head_channels
    return folded + (0 if lowest else lateral) < plain


class PlainLevel(nn.Module):
    """A level as mmseg's FPN computes it."""

    def __init__(self, lateral: nn.Conv2d, fpn_conv: nn.Conv2d) -> None:
        super().__init__()
        self.lateral = lateral
        self.fpn_conv = fpn_conv

    def merge(self, feature: Tensor, above: Tensor | None) -> Tensor:
        """(N, C, H, W) and, but for the topmost level, (N, M, h, w) to the merged lateral map (N, M, H, W)."""
        merged = self.lateral(feature)
        if above is not None:
            merged += F.interpolate(above, size=merged.shape[2:], mode='nearest')
        return merged

    def finish(self, merged: Tensor) -> Tensor:
        """The merged lateral map (N, M, H, W) to the level's output (N, M, H, W)."""
        return self.fpn_conv(merged)


class FoldedLevel(PlainLevel):
    """A level together with the first convolution of its scale head and the activation after it.

    The plain way is kept for maps that are not exactly twice the one above.

    Args:
        lateral: L, 1×1.
        fpn_conv: F, 3×3.
        head: S, 3×3, with the norm folded in.
        activation: act; ``nn.Identity`` for none.
    """

    def __init__(self, lateral: nn.Conv2d, fpn_conv: nn.Conv2d, head: nn.Conv2d, activation: nn.Module) -> None:
        super().__init__(lateral, fpn_conv)
        self.head = nn.Sequential(OrderedDict(conv=head, activate=activation))
        dtype = head.weight.dtype
        direct, from_above, bias, sides = fold_level(lateral, fpn_conv, head)
        self.direct = _conv(direct.to(dtype), bias.to(dtype), padding=2)
        self.from_above = _conv(from_above.to(dtype), None, padding=1)
        self.sides = nn.ModuleList()
        for (ring, inwards), horizontal in zip(sides, (True, True, False, False)):
            # The corners of the ring belong to its top and bottom.
            paddings = ((0, 2), (0, 0)) if horizontal else ((1, 0), (1, 0))
            ring = _conv(ring.to(dtype), fpn_conv.bias, paddings[0])
            self.sides.append(nn.Sequential(ring, _conv(inwards.to(dtype), None, paddings[1])))

    def finish(self, merged: Tensor) -> Tensor:
        """The merged lateral map (N, M, H, W) to the output (N, D, H, W) of the head's first convolution."""
        return self.head(super().finish(merged))

    def forward(self, feature: Tensor, above: Tensor) -> Tensor:
        """(N, C, 2h, 2w) and (N, M, h, w) to the output (N, D, 2h, 2w) of the head's first convolution."""
        # The lateral bias goes in before the upsampling, where it stops at the border by itself.
        bias = self.lateral.bias
        shifted = above if bias is None else above + bias.to(above.dtype)[:, None, None]
        out = self.direct(feature)
        out += F.pixel_shuffle(self.from_above(shifted), 2)
        for side, (dim, line) in zip(self.sides, ((2, 0), (2, -1), (3, 0), (3, -1))):
            merged = self.merge(feature.narrow(dim, line, 1), above.narrow(dim, line, 1))
            out = _subtract(out, side(merged), dim, line)
        return self.head.activate(out)


def _subtract(maps: Tensor, line: Tensor, dim: int, index: int) -> Tensor:
    """Subtract from the first (``index`` 0) or last (-1) line of maps along a dimension, in place where that can be."""
    if not torch.compiler.is_compiling():
        maps.narrow(dim, index, 1).sub_(line)
        return maps
    # Exporters know no views to write into, and make a scatter of it, which phones do not accelerate.
    rest = maps.shape[dim] - 1
    changed = maps.narrow(dim, index, 1) - line
    parts = (changed, maps.narrow(dim, 1, rest)) if index == 0 else (maps.narrow(dim, 0, rest), changed)
    return torch.cat(parts, dim)


class FoldedFPN(nn.Module):
    """The neck that :func:`fold_levels` makes the levels of: a tuple of features to a tuple of one map for each level.

    Output i is the output (N, D, H, W) of the head's first convolution where level i is folded, and FPN's own output
    (N, M, H, W) elsewhere.

    Args:
        levels: From the highest resolution to the lowest.
        start_level: Index of the feature that goes into the first level.
    """

    def __init__(self, levels: Sequence[PlainLevel], start_level: int = 0) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.start_level = start_level

    @property
    def folded(self) -> tuple[int, ...]:
        """Indices of the folded levels; empty where none pays."""
        return tuple(index for index, level in enumerate(self.levels) if isinstance(level, FoldedLevel))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        outs, above = [], None
        for index in reversed(range(len(self.levels))):
            level, feature = self.levels[index], features[self.start_level + index]
            fold = isinstance(level, FoldedLevel) and _is_twice(feature, above)
            # The level below needs the merged map, folded or not; below the lowest there is none.
            merged = None if fold and index == 0 else level.merge(feature, above)
            outs.append(level(feature, above) if fold else level.finish(merged))
            above = merged
        return tuple(reversed(outs))


def fold_levels(
    laterals: Sequence[nn.Conv2d], fpn_convs: Sequence[nn.Conv2d], firsts: Sequence[tuple[nn.Conv2d, nn.Module]]
) -> list[PlainLevel]:
    """Fold every level of a Semantic FPN of which :func:`folding_saves_flops`; the others stay plain.

    Args:
        laterals: The 1×1 convolution of each level, from the highest resolution to the lowest.
        fpn_convs: The 3×3 convolution of each.
        firsts: The head's first convolution on each, its norm folded, and the activation after it.

    Returns:
        One level each. Of a :class:`FoldedLevel` the head's first convolution and activation are part.
    """
    levels = []
    for index, (lateral, fpn_conv, (head, activation)) in enumerate(zip(laterals, fpn_convs, firsts)):
        channels = lateral.in_channels, lateral.out_channels, head.out_channels
        topmost = index == len(firsts) - 1
        if not topmost and folding_saves_flops(*channels, lowest=index == 0):
            levels.append(FoldedLevel(lateral, fpn_conv, head, activation))
        else:
            levels.append(PlainLevel(lateral, fpn_conv))
    return levels


def _conv(weight: Tensor, bias: Tensor | None, padding: int | tuple[int, int]) -> nn.Conv2d:
    """A convolution with these weights, which are fixed."""
    # On the meta device nothing is initialised, and no random number drawn.
    out_channels, in_channels, *size = weight.shape
    conv = nn.Conv2d(in_channels, out_channels, size, padding=padding, bias=bias is not None, device='meta')
    conv.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return conv


def _is_twice(feature: Tensor, above: Tensor) -> bool:
    return all(size == 2 * size_above for size, size_above in zip(feature.shape[2:], above.shape[2:]))
