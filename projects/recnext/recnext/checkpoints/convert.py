"""Checkpoint files from one layout to another; the conversion itself is :func:`.keys.convert_state_dict`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..models.recnext import ARCHS, RecNeXt
from ..utils.errors import UserError, printable
from ..utils.files import sha256_of
from ..utils.paths import CONFIGS, command
from .files import read_checkpoint, write_checkpoint, write_safetensors
from .keys import (
    BACKBONE,
    EMA_KEYS,
    LONGEST_KEY,
    STATE_DICT_KEYS,
    SWAPPED_EMA_KEY,
    Conversion,
    ConversionError,
    check_weights_fit,
    convert_meta,
    convert_state_dict,
    find_weights,
    get_state_dict,
    rename,
)

NOT_WEIGHTS = {
    'optimizer': 'optimizer state',
    'param_schedulers': 'scheduler state',
    'message_hub': 'log of scalars',
    **dict.fromkeys(EMA_KEYS, 'averaged weights, not asked for'),
    SWAPPED_EMA_KEY: 'raw weights: mmengine saves the averaged ones as state_dict',
    **dict.fromkeys(STATE_DICT_KEYS, 'weights, but the averaged ones were asked for'),
}

CLASSIFIERS = ('decode_head.conv_seg.weight', 'head.head.linear.weight')
"""The tensors with one row a class, of a segmentor and of a classifier."""


class Report(NamedTuple):
    """Account of one conversion: see :func:`convert_file`."""

    source: Path
    sha256: str
    destination: Path
    target: str
    conversion: Conversion
    left_out: dict[str, str]
    config: str | None

    def __str__(self) -> str:
        layout = self.conversion.layout
        renamed = sum(new != old for new, old in self.conversion.mapped.items())
        same = f' (already in {self.target} form, the weights are the same)' if layout.target == self.target else ''
        reasons = dict.fromkeys(self.left_out.values())
        left_out = [
            f'{why}: {", ".join(_shown(key) for key in self.left_out if self.left_out[key] == why)}' for why in reasons
        ]
        rows = [
            ('source', f'{self.source}, sha256 {self.sha256}'),
            ('layout', f'{layout}{same}'),
            ('arch', self.conversion.arch or 'as in the config'),
            ('mapped', f'{len(self.conversion.mapped)} tensors, {renamed} of them renamed'),
            ('left out', f'{len(self.left_out)} entries'),
            *(('', line) for line in left_out),
            ('written', f'{self.destination}, {self.destination.stat().st_size / 1e6:.1f} MB'),
            ('next', self._next()),
        ]
        return '\n'.join(f'{name:<9} {value}' for name, value in rows)

    def _next(self) -> str:
        segmentor = self.conversion.layout.kind == 'segmentor'
        if self.target == 'legacy':
            return f'load it with {"mmseg 0.x" if segmentor else "the code that it was released with"}'
        if self.target == 'timm':
            return f"timm.create_model('recnext_{self.conversion.arch}', checkpoint_path={str(self.destination)!r})"
        config = os.path.relpath(self.config) if self.config else 'CONFIG'
        if segmentor or self.target == 'mmpretrain':
            return command('test', config, str(self.destination))
        option = f'model.backbone.init_cfg.checkpoint={self.destination}'
        return command('train', config, '--cfg-options', option)


def _shown(key: str) -> str:
    return printable(key, LONGEST_KEY)


def convert_file(
    source: str | Path,
    destination: str | Path,
    target: str = 'mmseg1',
    ema: bool = False,
    expected: Mapping[str, Tensor] | None = None,
    config: str | None = None,
    sha256: str | None = None,
) -> Report:
    """Read a checkpoint of any known layout and write it in another.

    The same input gives the same bytes; of safetensors the same tensors, whose library orders the metadata at random.

    Args:
        source: A released segmentor or ImageNet file, one of this project, or safetensors.
        destination: Where to write; safetensors if it is called so, a PyTorch file otherwise.
        target: One of :data:`.keys.TARGETS`.
        ema: Take the averaged weights.
        expected: The state dict that the weights must fit, on any device, under the names of mmseg 1.x or mmpretrain;
            that of the released network, found from the weights, if None.
        config: The config that ``expected`` is of, for messages.
        sha256: Of ``source``, if it is known already.

    Raises:
        UserError: anything that does not fit or cannot be read or written; then nothing is written.
    """
    source, destination = (Path(os.path.expanduser(path)) for path in (source, destination))
    checkpoint = read_checkpoint(source)
    if os.path.exists(destination) and os.path.samefile(source, destination):
        raise UserError(f'{destination} is the source itself. Choose another destination.')
    try:
        conversion = convert_state_dict(get_state_dict(checkpoint, ema), target)
        what = config or f'the released {conversion.arch}'
        check_weights_fit(conversion.state_dict, _renamed(expected, conversion, target), what)
    except ConversionError as error:
        raise ConversionError(f'{source}: {error}') from None
    digest = sha256 or sha256_of(source)
    segmentor = conversion.layout.kind == 'segmentor'
    meta = convert_meta(checkpoint.get('meta'), target, *(_classes_of(conversion) if segmentor else ()))
    meta['source'] = dict(file=source.name, sha256=digest, layout=str(conversion.layout), arch=conversion.arch, ema=ema)
    # Clones, so that a file with views of larger storages does not drag these along.
    weights = {key: tensor.clone() for key, tensor in conversion.state_dict.items()}
    if destination.suffix == '.safetensors':
        write_safetensors(weights, destination, meta['source'])
    else:
        key = 'model' if target == 'legacy' and not segmentor else 'state_dict'
        write_checkpoint({'meta': meta, key: weights}, destination)
    left_out = {**conversion.left_out, **_other_entries(checkpoint, find_weights(checkpoint, ema))}
    return Report(
        source, digest, destination, target, conversion, left_out, config or _usual_config(conversion, target)
    )


def released_tensors(kind: str, arch: str, num_classes: int | None = None) -> dict[str, Tensor]:
    """Return the state dict of a released network on the ``meta`` device, without memory.

    Args:
        kind: ``'segmentor'``, ``'classifier'`` (under the names of mmpretrain) or ``'backbone'``.
        arch: Name of the variant.
        num_classes: Of the head; None means 150 or 1 000, as released.
    """
    with torch.device('meta'):
        if kind == 'segmentor':
            from ..models.semantic_fpn import RecNeXtSegmentor

            return RecNeXtSegmentor(arch, num_classes or 150).state_dict()
        if kind == 'backbone':
            return RecNeXt(arch).state_dict()
        from ..models.classifier import TwoBranchHead

        head = TwoBranchHead(ARCHS[arch]['channels'][-1], num_classes or 1000)
        return nn.ModuleDict(dict(backbone=RecNeXt(arch), head=head)).state_dict()


def _other_entries(checkpoint: Mapping, weights_key: str | None) -> dict[str, str]:
    """What stands in a file beside the weights that were taken."""
    others = [key for key in checkpoint if key not in ('meta', weights_key)] if weights_key else []
    return {str(key): NOT_WEIGHTS.get(key, 'not weights') for key in others}


def _renamed(expected: Mapping[str, Tensor] | None, conversion: Conversion, target: str) -> dict[str, Tensor]:
    """Return the tensors that there should be, under the names of the target."""
    kind = conversion.layout.kind
    if expected is None:
        if conversion.arch is None:
            raise ConversionError('No released RecNeXt has these channels and depths. Name its config with --config.')
        expected = released_tensors(kind, conversion.arch, *_classes_of(conversion))
    # What was converted is a backbone where there was no head, and where the head was left out.
    if kind == 'backbone' or (kind == 'classifier' and target == 'mmseg1'):
        of_backbone = {key: tensor for key, tensor in expected.items() if key.startswith(BACKBONE)}
        expected = of_backbone or expected
    return {rename(key, target, kind): tensor for key, tensor in expected.items()}


def _classes_of(conversion: Conversion) -> list[int]:
    """How many classes the head has, as a list of one; empty if there is no head."""
    for key in CLASSIFIERS:
        classifier = conversion.state_dict.get(key)
        if classifier is not None:
            if not classifier.numel():
                raise ConversionError(f'{key} has no classes.')
            return [classifier.shape[0]]
    return []


def _usual_config(conversion: Conversion, target: str) -> str | None:
    """A config of this project for such weights; None if there is none."""
    classes = _classes_of(conversion)
    if target == 'mmpretrain':
        found = sorted(CONFIGS.glob(f'recnext-{conversion.arch}_*_in1k.py')) if classes == [1000] else []
    else:
        found = sorted(CONFIGS.glob(f'fpn_recnext-{conversion.arch}_*.py')) if classes in ([], [150]) else []
    return str(found[0]) if found else None
