"""Pure functions between the released layouts and the names of this project.

Seven layouts are known, told apart by their keys alone:

=========================  ===============================  =====================================================
layout                     keys                             where from
=========================  ===============================  =====================================================
``legacy segmentor``       ``backbone.stem.stem.0...``      released ``*_ade20k.pth`` (mmseg 0.x)
``mmseg1 segmentor``       ``backbone.stem.0...``           this project in MMSegmentation 1.x
``legacy classifier``      ``stem.stem.0...``, ``head...``  released ImageNet files, safetensors of the hub
``timm classifier``        ``stem.0...``, ``head...``       this project in timm
``mmpretrain classifier``  ``backbone.stem.0...``,          this project in MMPretrain
                           ``head...``
``legacy backbone``        ``stem.stem.0...``               a released file without its head
``mmseg1 backbone``        ``stem.0...``                    this project
=========================  ===============================  =====================================================
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.recnext import ARCHS, STAGES
from ..utils.errors import UserError, printable

BACKBONE, HEAD = 'backbone.', 'head.'

TARGETS = {
    'mmseg1': ('', 'stem.'),
    'mmpretrain': (BACKBONE, 'stem.'),
    'timm': ('', 'stem.'),
    'legacy': ('', 'stem.stem.'),
}
"""The layouts that :func:`convert_state_dict` can write: how the keys of a backbone begin, and those of its stem.

Every other key is the same in all of them. In a segmentor, the keys of the backbone always begin with ``backbone.``;
``mmseg1`` has no place for a classification head.
"""

STEM = re.compile(r'^stem\.(stem\.)?')
BLOCK = re.compile(r'(?:backbone\.)?stages\.([0-3])\.blocks\.(\d{1,3})\.(.+)')

EMA_BUFFER = re.compile(r'ema_(backbone|neck|decode_head)_')
"""mmcv 1.x's EMAHook keeps its copy of ``backbone.stem...`` as ``ema_backbone_stem...`` among the weights."""

STATE_DICT_KEYS = ('state_dict', 'model')
"""Under which key a file keeps its weights: mmcv, mmengine | the ImageNet files. A bare state dict has neither."""

EMA_KEYS = ('model_ema', 'state_dict_ema')
"""Under which key a file keeps averaged weights: DeiT's training code | timm."""

SWAPPED_EMA_KEY = 'ema_state_dict'
"""mmengine's EMAHook swaps the two when it saves: the averages stand in ``state_dict``, the raw weights here."""

DISTRIBUTED = 'module.'
LISTED = 10
LONGEST_KEY = 120


class ConversionError(UserError):
    """The weights are not what was expected; nothing has been loaded or written."""


class Layout(NamedTuple):
    """How the keys of a state dict are spelled, and of what they are."""

    target: str  # one of TARGETS
    kind: str  # 'segmentor', 'classifier' or 'backbone'

    def __str__(self) -> str:
        return f'{self.target} {self.kind}'


class Conversion(NamedTuple):
    """A converted state dict and the account of it."""

    layout: Layout  # of the source
    arch: str | None  # name of the variant; None if no released one looks like this
    state_dict: dict[str, Tensor]  # the tensors under their new keys, in the order of the source
    mapped: dict[str, str]  # new key -> key in the source
    left_out: dict[str, str]  # key in the source -> why it has no place in the target


def find_weights(checkpoint: Mapping, ema: bool = False) -> str | None:
    """Return the key under which a checkpoint keeps its (averaged) weights; None if it is a bare state dict."""
    keys = (*EMA_KEYS, *STATE_DICT_KEYS) if ema else STATE_DICT_KEYS
    return next((key for key in keys if isinstance(checkpoint.get(key), Mapping)), None)


def get_state_dict(checkpoint: Mapping, ema: bool = False) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, without its wrapping and the ``module.`` of a distributed wrapper.

    Args:
        checkpoint: What a file holds: a state dict, bare or under one of :data:`STATE_DICT_KEYS`.
        ema: Take the averaged weights (see :data:`EMA_KEYS` and :data:`SWAPPED_EMA_KEY`). mmcv 1.x keeps them among
            the weights as ``ema_backbone_...``, in runs by iterations such as those of mmseg.

    Raises:
        ConversionError: there are no such weights, or what stands in their place is not tensors.
    """
    weights_key = find_weights(checkpoint, ema)
    state_dict = checkpoint if weights_key is None else checkpoint[weights_key]
    strange = [key for key, value in state_dict.items() if not isinstance(key, str) or not _has_values(value)]
    if strange or not state_dict:
        raise ConversionError(
            'This holds no state dict. Expected dense tensors by name, bare or under '
            f'{" or ".join(map(repr, STATE_DICT_KEYS))}; found {_shortened(strange or list(checkpoint)) or "nothing"}.'
        )
    if all(key.startswith(DISTRIBUTED) for key in state_dict):
        state_dict = {key.removeprefix(DISTRIBUTED): value for key, value in state_dict.items()}
    if ema and weights_key not in EMA_KEYS and SWAPPED_EMA_KEY not in checkpoint:
        return _mmcv_averages(state_dict)
    return state_dict


def _has_values(value: object) -> bool:
    """Return whether this is a tensor with a number of its own in memory for each of its elements."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        return False
    beyond = 1  # the elements that the dimensions so far reach over
    for stride, size in sorted((stride, size) for stride, size in zip(value.stride(), value.shape) if size > 1):
        if stride < beyond:
            return False
        beyond += stride * (size - 1)
    return True


def _mmcv_averages(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put the buffers of mmcv 1.x's EMAHook, ``ema_`` and the name with underscores, in the parameters' places."""
    averages = {key: value for key, value in state_dict.items() if EMA_BUFFER.match(key)}
    if not averages:
        raise ConversionError('This file holds no EMA weights. Leave out --ema to convert its plain weights.')
    plain = {key: value for key, value in state_dict.items() if key not in averages}
    taken = {key: averages.pop(f'ema_{key.replace(".", "_")}', value) for key, value in plain.items()}
    if averages:
        raise ConversionError(f'These EMA weights belong to no parameter: {_shortened(list(averages))}.')
    return taken


def detect_layout(state_dict: Mapping[str, Tensor]) -> Layout:
    """Tell the layout from the keys.

    Raises:
        ConversionError: no key names the stem of a RecNeXt.
    """
    stems = (re.match(r'(backbone\.)?stem\.(stem\.)?\d', key) for key in state_dict)
    stem = next(filter(None, stems), None)
    if stem is None:
        raise ConversionError(
            'These are not the weights of a RecNeXt: expected keys such as backbone.stem... or stem..., '
            f'found {_shortened(list(state_dict))}.'
        )
    prefixed, released = map(bool, stem.groups())
    if any(key.startswith(HEAD) for key in state_dict):
        return Layout('mmpretrain' if prefixed else 'legacy' if released else 'timm', 'classifier')
    return Layout('legacy' if released else 'mmseg1', 'segmentor' if prefixed else 'backbone')


def detect_arch(state_dict: Mapping[str, Tensor]) -> str | None:
    """Tell the variant from depths, channels and kind of token mixer; a missing tensor here or there does no harm.

    Returns:
        A name in :data:`ARCHS`, or None if no released variant looks like this.
    """
    depths, widths, token_mixers = [0] * STAGES, [Counter() for _ in range(STAGES)], Counter()
    for match, tensor in ((BLOCK.fullmatch(key), tensor) for key, tensor in state_dict.items()):
        if not match:
            continue
        stage, block, name = int(match[1]), int(match[2]), match[3]
        depths[stage] = max(depths[stage], block + 1)
        if name.startswith('channel_mixer.2.') and tensor.dim():
            widths[stage][tensor.shape[0]] += 1
        if name.startswith('token_mixer.'):
            token_mixers['attn' if '.norm.' in name or '.conv.' in name else 'conv'] += 1
    channels, mixers = tuple(map(_most_common, widths)), _most_common(token_mixers)
    for name, arch in ARCHS.items():
        if (arch['channels'], arch['depths'], arch['token_mixer']) == (channels, tuple(depths), mixers):
            return name
    return None


def _most_common(counter: Counter) -> object:
    return counter.most_common(1)[0][0] if counter else None


def rename(key: str, target: str, kind: str) -> str:
    """Return the name of a tensor in another layout; unchanged if it is there already.

    Args:
        key: In any layout.
        target: One of :data:`TARGETS`.
        kind: Of what it is, as in :class:`Layout`.
    """
    name = key.removeprefix(BACKBONE)
    if name == key and (kind == 'segmentor' or key.startswith(HEAD)):
        return key  # of a neck or a head
    prefix, stem = TARGETS[target]
    return (BACKBONE if kind == 'segmentor' else prefix) + STEM.sub(stem, name)


def convert_state_dict(state_dict: Mapping[str, Tensor], target: str = 'mmseg1') -> Conversion:
    """Rename the tensors of any known layout to that of ``target``; values are passed on as they are.

    Of a classifier, ``'mmseg1'`` takes the backbone.

    Raises:
        ConversionError: not a RecNeXt, two tensors that claim the same new name, or no classification head where
            ``target`` has one.
    """
    layout = detect_layout(state_dict)
    if target in ('mmpretrain', 'timm') and layout.kind != 'classifier':
        raise ConversionError(
            f'{target} form is for classifiers, and these are the weights of a {layout.kind}, without a '
            'classification head.'
        )
    mapped, left_out = {}, {}
    for key in state_dict:
        new = rename(key, target, layout.kind)
        if target == 'mmseg1' and layout.kind == 'classifier' and key.startswith(HEAD):
            left_out[key] = 'ImageNet classification head'
        elif EMA_BUFFER.match(key):
            left_out[key] = "averaged copy kept by mmcv's EMAHook"
        elif new in mapped:
            clash = ' and '.join(printable(name, LONGEST_KEY) for name in (mapped[new], key))
            raise ConversionError(f'Two tensors would both become {printable(new, LONGEST_KEY)}: {clash}.')
        else:
            mapped[new] = key
    tensors = {new: state_dict[key] for new, key in mapped.items()}
    return Conversion(layout, detect_arch(state_dict), tensors, mapped, left_out)


def select_backbone(conversion: Conversion) -> Conversion:
    """Return, of a segmentor, the backbone alone, under the backbone's own names; a backbone as it is."""
    if conversion.layout.kind != 'segmentor':
        return conversion
    mapped = {new.removeprefix(BACKBONE): key for new, key in conversion.mapped.items() if new.startswith(BACKBONE)}
    others = {key: 'neck or head' for new, key in conversion.mapped.items() if not new.startswith(BACKBONE)}
    return conversion._replace(
        state_dict={new: conversion.state_dict[BACKBONE + new] for new in mapped},
        mapped=mapped,
        left_out={**others, **conversion.left_out},
    )


def of_other_classes(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], class_tensors: re.Pattern
) -> list[str]:
    """Return the names of the tensors that differ from the expected ones in the number of classes, and in nothing else.

    Args:
        state_dict: What was found.
        expected: The state dict of the network.
        class_tensors: The names of the tensors whose first dimension is the number of classes.
    """
    shapes = {
        key: (tensor.shape, expected[key].shape)
        for key, tensor in state_dict.items()
        if key in expected and class_tensors.fullmatch(key)
    }
    return [key for key, (found, wanted) in shapes.items() if found != wanted and found[1:] == wanted[1:]]


def check_weights_fit(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Make sure that every expected tensor is there, with its shape and dtype and of finite numbers, and no other.

    Args:
        state_dict: What was found.
        expected: The state dict of the network, on any device (``meta`` will do).
        what: Of what, for the message.

    Raises:
        ConversionError: that the two are of different variants, if they are; then the first ten disagreements and
            their number.
    """
    wrong = [f'missing: {key}' for key in expected if key not in state_dict]
    wrong += [f'unexpected: {printable(key, LONGEST_KEY)}' for key in state_dict if key not in expected]
    for key in expected.keys() & state_dict.keys():
        found, wanted = state_dict[key], expected[key]
        if found.shape != wanted.shape:
            wrong.append(f'shape of {key}: found {tuple(found.shape)}, expected {tuple(wanted.shape)}')
        elif found.dtype != wanted.dtype:
            wrong.append(f'dtype of {key}: found {found.dtype}, expected {wanted.dtype}')
        elif not found.isfinite().all():
            wrong.append(f'numbers of {key}: found NaN or infinity')
    if wrong:
        arch, own = detect_arch(state_dict), detect_arch(expected)
        variants = f'The file is {arch}, the network {own}.\n' if arch and own and arch != own else ''
        more = f'\n  ... and {len(wrong) - LISTED} more' if len(wrong) > LISTED else ''
        listed = ''.join(f'\n  {line}' for line in sorted(wrong)[:LISTED])
        raise ConversionError(f'{variants}The weights do not fit {what}; {len(wrong)} disagreement(s):{listed}{more}')


def _shortened(keys: list, most: int = 5) -> str:
    shown = ', '.join(repr(key)[:60] for key in keys[:most])
    return shown + (f', ... ({len(keys)} in all)' if len(keys) > most else '')


def convert_meta(meta: object, target: str, num_classes: int | None = None) -> dict:
    """The part of a checkpoint's ``meta`` that says what the weights are, as mmseg 1.x or 0.x spells it.

    Args:
        meta: As found; what is not of the expected type counts as absent.
        target: See :data:`TARGETS`; ``'legacy'`` is spelled as in mmseg 0.x, the others as in 1.x.
        num_classes: Of a segmentor. Where the names of its classes are absent and there are 150, they are ADE20K's.
    """
    meta = meta if isinstance(meta, Mapping) else {}
    known = meta.get('dataset_meta') if isinstance(meta.get('dataset_meta'), Mapping) else {}
    classes, palette = meta.get('CLASSES', known.get('classes')), meta.get('PALETTE', known.get('palette'))
    kept = {key: meta[key] for key in ('epoch', 'iter', 'seed') if isinstance(meta.get(key), int)}
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        from ..models.ade20k import ade20k_classes

        classes, palette = ade20k_classes()
        if num_classes != len(classes):
            return kept
    palette = _plain_palette(palette)
    if target == 'legacy':
        return {'mmseg_version': '0.30.0', 'CLASSES': tuple(classes), 'PALETTE': palette, **kept}
    return {'dataset_meta': {'classes': tuple(classes), 'palette': palette}, **kept}


def read_classes(content: dict, number: int) -> tuple[list[str] | None, list[list[int]] | None]:
    """Return names and RGB colours of ``number`` classes as a checkpoint says them; None in the place of either."""
    meta = convert_meta(content.get('meta'), 'mmseg1').get('dataset_meta', {})
    classes, palette = meta.get('classes', ()), meta.get('palette') or ()
    names = [printable(name) for name in classes] if len(classes) == number else None
    return names, palette if names and len(palette) == number else None


def _plain_palette(palette: object) -> list[list[int]] | None:
    """One colour a class, three numbers up to 255 each; None if it is anything else."""
    palette = palette.tolist() if isinstance(palette, np.ndarray) else palette
    right = isinstance(palette, list | tuple) and all(
        isinstance(colour, list | tuple) and len(colour) == 3 and all(value in range(256) for value in colour)
        for colour in palette
    )
    return [[int(value) for value in colour] for colour in palette] if right else None
