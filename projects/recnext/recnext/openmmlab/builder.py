"""Networks built from a config: without memory, to know which tensors they have, or without reading weights."""

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn

from ..utils.errors import UserError
from .config_check import named_mistakes
from .pretrained import pretrained_files, without_pretrained


def build_on_meta(model_cfg: dict) -> nn.Module:
    """Build the network of a config's ``model`` on the ``meta`` device: names, shapes and dtypes, but no values.

    Raises:
        UserError: it cannot be built; with the reason, such as the name of a misspelt argument.
    """
    init_default_scope('mmseg')
    _check_heads(model_cfg)
    with named_mistakes('model', model_cfg), quiet_mmseg():
        try:
            with torch.device('meta'):
                return MODELS.build(copy.deepcopy(model_cfg))  # EncoderDecoder changes what it is built from
        except RuntimeError:
            # Swin and others read numbers off a tensor as they are built, and one on this device has none.
            return MODELS.build(copy.deepcopy(model_cfg)).to('meta')


@contextlib.contextmanager
def quiet_mmseg() -> Iterator[None]:
    """Keep quiet, inside this context, what mmseg warns of its own use of its own functions."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', module='mmseg')
        yield


def _check_heads(model_cfg: dict) -> None:
    """Refuse several heads where one is expected: only the word for the segmentor has been changed."""
    heads, kind = model_cfg.get('decode_head'), model_cfg.get('type')
    if kind in ('FastEncoderDecoder', 'RecNeXtEncoderDecoder') and isinstance(heads, list | tuple):
        raise UserError(
            f'model.decode_head has {len(heads)} heads, one after the other, and {kind} takes one. Cascades '
            "(CascadeEncoderDecoder) train and test with mmseg's own tools."
        )


def build_without_weights(model_cfg: dict, **changes: object) -> nn.Module:
    """Build the network of a config's ``model``, with ``changes`` to it, and read no file of weights."""
    init_default_scope('mmseg')
    model_cfg = copy.deepcopy(model_cfg)
    model_cfg.update(changes)
    drop_pretrained(model_cfg)
    with quiet_mmseg():
        return MODELS.build(model_cfg)


def drop_pretrained(part: dict) -> None:
    """Take the files of weights to start from out of a config's ``model``, wherever it names them; in place."""
    for key, value in part.items():
        if key == 'pretrained':  # mmseg's older word
            part[key] = None
        elif key == 'init_cfg' and pretrained_files(value):
            part[key] = without_pretrained(value) or None
        else:
            for inside in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inside, dict):
                    drop_pretrained(inside)
