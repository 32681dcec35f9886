"""Networks built from a config without memory, to know which tensors they have."""

import copy
from collections.abc import Callable

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from torch import nn
from torch.overrides import TorchFunctionMode

from ..models.recnext import ARCHS
from ..utils.errors import UserError
from ..utils.paths import CONFIGS
from .pretrained import pretrained_files, without_pretrained


def build_on_meta(model_cfg: dict) -> nn.Module:
    """The network of a config's ``model`` on the ``meta`` device: names, shapes and dtypes, but no values.

    Raises:
        UserError: it cannot be built; with the reason, such as the name of a misspelt argument.
    """
    init_default_scope('mmseg')
    try:
        try:
            with torch.device('meta'), _WithoutDrawing():
                return MODELS.build(copy.deepcopy(model_cfg))  # EncoderDecoder changes what it is built from
        except RuntimeError:
            # Swin and others read numbers off a tensor as they are built, and one on this device has none.
            return MODELS.build(copy.deepcopy(model_cfg)).to('meta')
    except (TypeError, KeyError, AssertionError, RuntimeError) as error:
        raise UserError(f'The model of the config cannot be built: {error}') from None


class _WithoutDrawing(TorchFunctionMode):
    """Draw no random numbers: to draw them on the ``meta`` device loads PyTorch's compiler, a second of work."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        return args[0] if func is torch.Tensor.normal_ else func(*args, **(kwargs or {}))


def build_without_weights(model_cfg: dict, **changes: object) -> nn.Module:
    """The network of a config's ``model``, with ``changes`` to it, as its constructors leave it: no file is read."""
    init_default_scope('mmseg')
    model_cfg = copy.deepcopy(model_cfg)
    model_cfg.update(changes)
    drop_pretrained(model_cfg)
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


def released_model_cfg(arch: str, num_classes: int = 150) -> dict:
    """The ``model`` of the released segmentor of one variant, without pretrained weights."""
    model_cfg = Config.fromfile(CONFIGS / '_base_' / 'models' / 'fpn_recnext.py').model
    model_cfg.backbone.arch = arch
    model_cfg.neck.in_channels = list(ARCHS[arch]['channels'])
    model_cfg.decode_head.num_classes = num_classes
    return model_cfg
