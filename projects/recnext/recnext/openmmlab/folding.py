"""Folding of mmseg's own modules: mmcv's ConvModule, FPN and FPNHead; the arithmetic is that of :mod:`..models`."""

import copy
from collections.abc import Iterator

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import FPNHead
from mmseg.models.necks import FPN
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..models.folded_fpn import FoldedFPN, FoldedLevel, fold_levels
from ..models.folding import fold_norm, is_foldable
from ..utils.errors import UserError


def fold_conv_modules(module: nn.Module) -> None:
    """Fold the norm of every mmcv ConvModule inside into its convolution, where that is exact; in place, idempotent."""
    for part in conv_modules(module):
        plain = type(part.conv) is nn.Conv2d and not part.with_spectral_norm and part.order == ('conv', 'norm', 'act')
        if part.with_norm and plain and is_foldable(part.norm):
            part.conv = fold_norm(part.conv, part.norm)
            setattr(part, part.norm_name, nn.Identity().train(part.training))
            # It would look for statistics in the norm. mmcv 2.0 has no such forward, and does not look at this.
            part.efficient_conv_bn_eval_forward = None


def conv_modules(module: nn.Module) -> list[ConvModule]:
    """All of mmcv's ConvModules in a network."""
    return [m for m in module.modules() if isinstance(m, ConvModule)]


def fold_fpn(neck: nn.Module, head: nn.Module) -> tuple[FoldedFPN, FPNHead]:
    """Return a new neck and a new head with the same head(neck(features)); those given stay as they are.

    Every norm of the head is folded, and every level of which :func:`.folding_saves_flops`; ``scale_heads[i][0]`` of a
    folded level moves into the neck. Idempotent: a :class:`FoldedFPN` and its head are returned unchanged.

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
    firsts = [(scale_head[0].conv, _activation(scale_head[0])) for scale_head in head.scale_heads]
    laterals, convs = ([module.conv for module in part] for part in (neck.lateral_convs, neck.fpn_convs))
    levels = fold_levels(laterals, convs, firsts)
    for level, scale_head in zip(levels, head.scale_heads):
        if isinstance(level, FoldedLevel):
            scale_head[0] = nn.Identity()
    # New modules are in training mode.
    return FoldedFPN(levels, neck.start_level).eval(), head.eval()


def _activation(module: ConvModule) -> nn.Module:
    return module.activate if module.with_activation else nn.Identity()


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
