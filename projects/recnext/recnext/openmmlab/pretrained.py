"""Weights to start training from: found, checked and loaded, or an error before the first iteration."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from torch import nn

from ..checkpoints.files import CheckpointError, read_checkpoint, write_checkpoint
from ..checkpoints.keys import (
    LONGEST_KEY,
    Conversion,
    check_weights_fit,
    convert_state_dict,
    get_state_dict,
    select_backbone,
)
from ..checkpoints.releases import resolve_checkpoint
from ..utils.errors import printable
from ..utils.files import sha256_of

PRETRAINED = ('Pretrained', 'mmengine.Pretrained', PretrainedInit)


class StrictlyPretrained(BaseModule):
    """Loads what its ``init_cfg`` names as Pretrained by itself: mmengine would only log what does not fit."""

    read_before: Conversion | None = None
    """The weights of the file in ``init_cfg``, if a check has read them; let go of when they are loaded."""

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; see :meth:`load_pretrained`."""
        init_cfg = self.init_cfg
        self.init_cfg = without_pretrained(init_cfg)
        try:
            super().init_weights()
        finally:
            self.init_cfg = init_cfg
        for file in pretrained_files(init_cfg):
            self.load_pretrained(file)

    def load_pretrained(self, checkpoint: str) -> None:
        """Load a file, or raise a UserError, and say in one line what was loaded and what left out."""
        raise NotImplementedError


def pretrained_files(init_cfg: Mapping | Sequence[Mapping] | None) -> list[str]:
    """Return the files of weights that an ``init_cfg`` asks for."""
    return [cfg['checkpoint'] for cfg in _as_list(init_cfg) if cfg['type'] in PRETRAINED]


def without_pretrained(init_cfg: Mapping | Sequence[Mapping] | None) -> list[Mapping]:
    """Return the rest of an ``init_cfg``."""
    return [cfg for cfg in _as_list(init_cfg) if cfg['type'] not in PRETRAINED]


def _as_list(init_cfg: Mapping | Sequence[Mapping] | None) -> list[Mapping]:
    return [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg or [])


def read_pretrained(backbone: nn.Module, checkpoint: str) -> tuple[Path, Conversion]:
    """Read a backbone's weights from any known file: ImageNet as released, converted, or of a whole segmentor.

    Args:
        backbone: A RecNeXt, on any device.
        checkpoint: Path, absolute, or relative to the working directory or to the project; or an address.

    Returns:
        Where the file was found, and its weights under the backbone's names.

    Raises:
        UserError: no such file, with where to get it; or weights that do not fit exactly.
    """
    try:
        path = resolve_checkpoint(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(
            f'The ImageNet weights to start from are missing. {error}\n'
            '  Or train from scratch on purpose: --cfg-options model.backbone.init_cfg=None'
        ) from None
    conversion = select_backbone(convert_state_dict(get_state_dict(read_checkpoint(path))))
    check_weights_fit(conversion.state_dict, backbone.state_dict(), f'the backbone; {path} is {conversion.arch}')
    return path, conversion


def load_pretrained(backbone: StrictlyPretrained, checkpoint: str) -> None:
    """Load what :func:`read_pretrained` reads, and say in one line what was loaded and what left out."""
    if backbone.read_before is None:
        path, conversion = read_pretrained(backbone, checkpoint)
    else:
        path, conversion = resolve_checkpoint(checkpoint), backbone.read_before
        del backbone.read_before
    backbone.load_state_dict(conversion.state_dict, strict=True)
    log_loaded('Backbone', path, conversion.mapped, conversion.left_out)


def log_loaded(what: str, path: Path, loaded: Collection[str], left_out: Collection[str]) -> None:
    """Say in one line of what file which tensors were loaded and which left out."""
    names = ', '.join(printable(key, LONGEST_KEY) for key in left_out) or 'none'
    print_log(
        f'{what} weights: {path}, sha256 {sha256_of(path)}, {len(loaded)} tensors loaded, '
        f'{len(left_out)} left out: {names}',
        logger='current',
    )


def read_foreign_weights(part: dict) -> None:
    """Fetch and read the weights that parts of other projects would start from; their paths then stand in the config.

    mmengine unpickles what it loads, in older versions of PyTorch whatever that is. So each file is read here first,
    without running anything in it, and mmengine gets the file on this machine and no address.

    Args:
        part: The ``model`` of a config; changed in place.

    Raises:
        UserError: a file that is not there, or that wants more than data and tensors.
    """
    kind = part.get('type')
    if (kind if isinstance(kind, str) else getattr(kind, '__name__', '')).rpartition('.')[2] == 'RecNeXt':
        return  # reads its weights itself
    for key, value in part.items():
        if key == 'pretrained' and isinstance(value, str):  # mmseg's older word
            part[key] = _read_here(value)
        elif key == 'init_cfg':
            for cfg in _as_list(value):
                if isinstance(cfg.get('checkpoint'), str):
                    cfg['checkpoint'] = _read_here(cfg['checkpoint'])
        else:
            for inside in value if isinstance(value, list | tuple) else [value]:
                if isinstance(inside, dict):
                    read_foreign_weights(inside)


def _read_here(checkpoint: str) -> str:
    path = resolve_checkpoint(_address_of(checkpoint))
    content = read_checkpoint(path)
    if not checkpoint.startswith('mmcls://'):
        return str(path)
    # As mmengine loads these: the backbone alone.
    weights, alone = get_state_dict(content), path.with_name(f'backbone-{path.name}')
    prefix = 'backbone.'
    write_checkpoint({key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)}, alone)
    return str(alone)


def _address_of(checkpoint: str) -> str:
    """Return the address of a name that mmengine has in a table, such as ``open-mmlab://resnet50_v1c``.

    Raises:
        CheckpointError: its table has no such name.
    """
    from mmengine.runner import checkpoint as mmengine_checkpoint

    scheme, separator, name = checkpoint.partition('://')
    tables = {
        'torchvision': mmengine_checkpoint.get_torchvision_models,
        'modelzoo': mmengine_checkpoint.get_torchvision_models,
        'open-mmlab': mmengine_checkpoint.get_external_models,
        'openmmlab': mmengine_checkpoint.get_external_models,
        'mmcls': mmengine_checkpoint.get_mmcls_models,
    }
    if not separator or scheme not in tables:
        return checkpoint
    table = tables[scheme]()
    if 'mmlab' in scheme:
        name = mmengine_checkpoint.get_deprecated_model_names().get(name, name)
    if name not in table:
        raise CheckpointError(f'{checkpoint} is no name that mmengine knows an address for.')
    return table[name]
