"""Semantic FPN for deployment: the convolutions of FPN and the first of FPNHead composed into one where it pays.

mmseg's FPN has no norm and no activation, so everything from a feature c_i to the first activation of FPNHead is
linear (U is nearest upsampling, the head's norm stands folded in S and s)::

    l_i = L c_i + b + U l_(i+1)     lateral 1×1,  C -> M channels
    p_i = F l_i + f                 FPN 3×3,      M -> M
    h_i = act(S p_i + s)            head 3×3,     M -> D

With K = S ∘ F, a 5×5 kernel, S F l_i = (K ∘ L) c_i + (K U)(l_(i+1) + b): a 5×5 convolution C -> D of the feature, and
a 3×3 convolution M -> 4D of the map above, one D for each of the four pixels that U makes of one. The map l_i itself is
never made. It pays where a feature has few channels: see :func:`pays`.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import FPNHead
from mmseg.models.necks import FPN
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..utils.errors import UserError
from .folding import conv_modules, fold_conv_modules, is_foldable


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


def pays(in_channels: int, fpn_channels: int, head_channels: int, lowest: bool = True) -> bool:
    """Whether a level takes fewer multiply-adds per pixel when it is folded.

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
    """A level together with the first ConvModule of its scale head, whose norm is folded already.

    The plain way is kept for maps that are not exactly twice the one above.
    """

    def __init__(self, lateral: nn.Conv2d, fpn_conv: nn.Conv2d, head: ConvModule) -> None:
        super().__init__(lateral, fpn_conv)
        self.head = head
        dtype = head.conv.weight.dtype
        direct, from_above, bias, sides = fold_level(lateral, fpn_conv, head.conv)
        self.direct = _conv(direct.to(dtype), bias.to(dtype), padding=2)
        self.from_above = _conv(from_above.to(dtype), None, padding=1)
        self.sides = nn.ModuleList()
        for (ring, inwards), horizontal in zip(sides, (True, True, False, False)):
            # The corners of the ring belong to its top and bottom.
            paddings = ((0, 2), (0, 0)) if horizontal else ((1, 0), (1, 0))
            ring = _conv(ring.to(dtype), fpn_conv.bias, paddings[0])
            self.sides.append(nn.Sequential(ring, _conv(inwards.to(dtype), None, paddings[1])))

    def finish(self, merged: Tensor) -> Tensor:
        """The merged lateral map (N, M, H, W) to the output (N, D, H, W) of the head's first ConvModule."""
        return self.head(super().finish(merged))

    def forward(self, feature: Tensor, above: Tensor) -> Tensor:
        """(N, C, 2h, 2w) and (N, M, h, w) to the output (N, D, 2h, 2w) of the head's first ConvModule."""
        # The lateral bias goes in before the upsampling, where it stops at the border by itself.
        bias = self.lateral.bias
        shifted = above if bias is None else above + bias.to(above.dtype)[:, None, None]
        out = self.direct(feature)
        out += F.pixel_shuffle(self.from_above(shifted), 2)
        for side, (dim, line) in zip(self.sides, ((2, 0), (2, -1), (3, 0), (3, -1))):
            merged = self.merge(feature.narrow(dim, line, 1), above.narrow(dim, line, 1))
            out = _subtract(out, side(merged), dim, line)
        return self.head.activate(out) if self.head.with_activation else out


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
    """The neck that :func:`fold_fpn` makes: a tuple of features to a tuple of one map for each level.

    Output i is the output (N, D, H, W) of the head's first ConvModule where level i is folded, and FPN's own output
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


def fold_fpn(neck: nn.Module, head: nn.Module) -> tuple[FoldedFPN, FPNHead]:
    """A new neck and a new head with the same head(neck(features)); those given stay as they are.

    Every norm of the head is folded, and every level that :func:`pays`; ``scale_heads[i][0]`` of a folded level moves
    into the neck. Idempotent: a :class:`FoldedFPN` and its head are returned unchanged.

    Raises:
        UserError: training mode, or a neck or head that cannot be folded.
    """
    if isinstance(neck, FoldedFPN):
        return neck, head
    for obstacle in _obstacles(neck, head):
        raise UserError(
            'Only FPN without norm or activation, with nearest upsampling, and FPNHead on all its outputs, with batch '
            f'normalisation or none, can be folded; found {obstacle}.'
        )
    if any(module.training for part in (neck, head) for module in part.modules()):
        raise UserError('fold_fpn() fixes the norm statistics for good: call .eval() on the network first.')

    neck, head = copy.deepcopy((neck, head))
    fold_conv_modules(head)
    levels = []
    for index, (lateral, fpn_conv, scale_head) in enumerate(zip(neck.lateral_convs, neck.fpn_convs, head.scale_heads)):
        channels = (lateral.in_channels, lateral.out_channels, head.channels)
        topmost = index == len(head.scale_heads) - 1
        if not topmost and pays(*channels, lowest=index == 0):
            levels.append(FoldedLevel(lateral.conv, fpn_conv.conv, scale_head[0]))
            scale_head[0] = nn.Identity()
        else:
            levels.append(PlainLevel(lateral.conv, fpn_conv.conv))
    # New modules are in training mode.
    return FoldedFPN(levels, neck.start_level).eval(), head.eval()


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


def _obstacles(neck: nn.Module, head: nn.Module) -> Iterator[str]:
    """What stands in the way, in words; each is looked for where those before it are absent."""
    # Not isinstance: what a subclass computes is not known.
    for part, kind in ((neck, FPN), (head, FPNHead)):
        if type(part) is not kind:
            yield f'{type(part).__name__} in the place of {kind.__name__}'
    levels = len(neck.lateral_convs)
    if neck.num_outs != levels:
        yield f'an FPN with {neck.num_outs} outputs from {levels} levels (add_extra_convs={neck.add_extra_convs})'
    if list(head.in_index) != list(range(levels)):
        yield f'an FPNHead with in_index={head.in_index} on {levels} outputs'
    if {'mode': 'nearest', **neck.upsample_cfg} != {'mode': 'nearest'}:
        yield f'an FPN with upsample_cfg={dict(neck.upsample_cfg)}'
    for module in conv_modules(neck):
        if module.with_norm:
            yield f'an FPN with a norm ({type(module.norm).__name__})'
        if module.with_activation:
            yield f'an FPN with an activation ({type(module.activate).__name__})'

    firsts = [scale_head[0] for scale_head in head.scale_heads]
    for place, modules, size in (
        ('lateral_convs', neck.lateral_convs, 1),
        ('fpn_convs', neck.fpn_convs, 3),
        ('scale_heads', firsts, 3),
    ):
        for module in modules:
            yield from (f'{found} in {place}' for found in _conv_obstacles(module, size))
    for module in conv_modules(head):
        if module.order != ('conv', 'norm', 'act'):
            yield f'an FPNHead with the order {" -> ".join(module.order)}'
        if isinstance(module.norm, _BatchNorm) and module.norm.running_mean is None:
            yield 'an FPNHead with a norm that keeps no running statistics'
        elif module.with_norm and not (is_foldable(module.norm) or isinstance(module.norm, nn.Identity)):
            yield f'an FPNHead with {type(module.norm).__name__}'


def _conv_obstacles(module: nn.Module, size: int) -> Iterator[str]:
    conv = getattr(module, 'conv', None)
    if not isinstance(module, ConvModule) or type(conv) is not nn.Conv2d:
        yield type(module if conv is None else conv).__name__
        return
    if module.with_spectral_norm:
        yield 'a spectral norm'
    if module.with_explicit_padding:
        yield f'a padding by {type(module.padding_layer).__name__}'
    expected = dict(kernel_size=size, padding=size // 2, stride=1, dilation=1)
    for name, value in expected.items():
        if getattr(conv, name) != (value, value):
            yield f'a convolution with {name}={getattr(conv, name)}'
    if conv.groups != 1 or conv.padding_mode != 'zeros':
        yield f'a convolution with groups={conv.groups}, padding_mode={conv.padding_mode!r}'
