"""Weights to start training from: found, checked and loaded, or an error before the first iteration."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from torch import nn

from ..checkpoints.files import CheckpointError, read_checkpoint
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

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; see :meth:`load_pretrained`."""
        init_cfg = self.init_cfg
        self.init_cfg = without_pretrained(init_cfg)
        super().init_weights()
        self.init_cfg = init_cfg
        for file in pretrained_files(init_cfg):
            self.load_pretrained(file)

    def load_pretrained(self, checkpoint: str) -> None:
        """Load a file, or raise a UserError, and say in one line what was loaded and what left out."""
        raise NotImplementedError


def pretrained_files(init_cfg: Mapping | Sequence[Mapping] | None) -> list[str]:
    """The files of weights that an ``init_cfg`` asks for."""
    return [cfg['checkpoint'] for cfg in _as_list(init_cfg) if cfg['type'] in PRETRAINED]


def without_pretrained(init_cfg: Mapping | Sequence[Mapping] | None) -> list[Mapping]:
    """The rest of an ``init_cfg``."""
    return [cfg for cfg in _as_list(init_cfg) if cfg['type'] not in PRETRAINED]


def _as_list(init_cfg: Mapping | Sequence[Mapping] | None) -> list[Mapping]:
    return [init_cfg] if isinstance(init_cfg, Mapping) else list(init_cfg or [])


_checked: dict[Path, dict] = {}
"""What was read to see whether it fits, until it is loaded."""


def read_to_check(path: Path) -> dict:
    """Read a checkpoint that is loaded later, for :func:`read_to_load`."""
    _checked[path] = read_checkpoint(path)
    return _checked[path]


def read_to_load(path: Path) -> dict:
    """A checkpoint, read now unless it was to be checked."""
    return _checked.pop(path) if path in _checked else read_checkpoint(path)


def read_pretrained(
    backbone: nn.Module, checkpoint: str, read: Callable[[Path], dict] = read_checkpoint
) -> tuple[Path, Conversion]:
    """Read a backbone's weights from any known file: ImageNet as released, converted, or of a whole segmentor.

    Args:
        backbone: A RecNeXt, on any device.
        checkpoint: Path, absolute, or relative to the working directory or to the project; or an address.
        read: How: to check it, or to load it.

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
    conversion = select_backbone(convert_state_dict(get_state_dict(read(path))))
    check_weights_fit(conversion.state_dict, backbone.state_dict(), f'the backbone; {path} is {conversion.arch}')
    return path, conversion


def load_pretrained(backbone: nn.Module, checkpoint: str) -> None:
    """Load what :func:`read_pretrained` reads, and say in one line what was loaded and what left out."""
    path, conversion = read_pretrained(backbone, checkpoint, read_to_load)
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
