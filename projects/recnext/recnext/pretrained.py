"""ImageNet weights for the backbone: found, checked and loaded, or an error before the first iteration."""

from collections.abc import Mapping

from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from torch import nn

from .checkpoint import read_checkpoint, sha256_of
from .conversion import check_fit, convert, get_state_dict, select_backbone
from .errors import UserError
from .paths import find_path
from .released import find_release


def is_pretrained(init_cfg: Mapping) -> bool:
    """Whether an ``init_cfg`` asks for a file of weights."""
    return init_cfg['type'] in ('Pretrained', 'mmengine.Pretrained', PretrainedInit)


def load_pretrained(backbone: nn.Module, checkpoint: str) -> None:
    """Load a backbone's weights from any known file: ImageNet as released, converted, or of a whole segmentor.

    Args:
        backbone: A RecNeXt.
        checkpoint: Path, absolute, or relative to the working directory or to the project.

    Raises:
        UserError: no such file, with where to get it; or weights that do not fit exactly.
    """
    path = find_path(checkpoint)
    if path is None:
        release = find_release(checkpoint)
        raise UserError(
            f'The ImageNet weights to start from are missing: {checkpoint}\n'
            + (f'  Download {release["url"]}\n  and save it as {checkpoint};\n' if release else '')
            + '  or train from scratch on purpose: --cfg-options model.backbone.init_cfg=None'
        )
    conversion = select_backbone(convert(get_state_dict(read_checkpoint(path))))
    check_fit(conversion.state_dict, backbone.state_dict(), f'the backbone; {path} is {conversion.arch}')
    backbone.load_state_dict(conversion.state_dict, strict=True)
    left_out = ', '.join(conversion.left_out) or 'none'
    print_log(
        f'Backbone weights: {path}, sha256 {sha256_of(path)}, {len(conversion.mapped)} tensors loaded, '
        f'{len(conversion.left_out)} left out: {left_out}',
        logger='current',
    )
