"""ImageNet weights for the backbone: found, checked and loaded, or an error before the first iteration."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from torch import nn

from .checkpoint import download, read_checkpoint, sha256_of
from .conversion import Conversion, check_fit, convert, get_state_dict, select_backbone
from .errors import UserError
from .paths import find_path
from .released import find_release

PRETRAINED = ('Pretrained', 'mmengine.Pretrained', PretrainedInit)


def pretrained_files(init_cfg: Mapping | Sequence[Mapping] | None) -> list[str]:
    """The files of weights that an ``init_cfg`` asks for."""
    return [cfg['checkpoint'] for cfg in _as_list(init_cfg) if cfg['type'] in PRETRAINED]


def without_pretrained(init_cfg: Mapping | Sequence[Mapping] | None) -> list[Mapping]:
    """The rest of an ``init_cfg``."""
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
    path = download(checkpoint) if '://' in checkpoint else find_path(checkpoint)
    if path is None:
        release = find_release(checkpoint)
        raise UserError(
            f'The ImageNet weights to start from are missing: {checkpoint}\n'
            + (f'  Download {release["url"]}\n  and save it as {checkpoint};\n' if release else '')
            + '  or train from scratch on purpose: --cfg-options model.backbone.init_cfg=None'
        )
    conversion = select_backbone(convert(get_state_dict(read_checkpoint(path))))
    check_fit(conversion.state_dict, backbone.state_dict(), f'the backbone; {path} is {conversion.arch}')
    return path, conversion


def load_pretrained(backbone: nn.Module, checkpoint: str) -> None:
    """Load what :func:`read_pretrained` reads, and say in one line what was loaded and what left out."""
    path, conversion = read_pretrained(backbone, checkpoint)
    backbone.load_state_dict(conversion.state_dict, strict=True)
    print_log(
        f'Backbone weights: {path}, sha256 {sha256_of(path)}, {len(conversion.mapped)} tensors loaded, '
        f'{len(conversion.left_out)} left out: {", ".join(conversion.left_out) or "none"}',
        logger='current',
    )
