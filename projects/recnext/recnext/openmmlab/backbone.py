"""RecNeXt as a backbone of MMEngine's registry, which mmseg's and mmpretrain's fall back on."""

import copy
from collections.abc import Mapping

from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS

from ..models import recnext
from .pretrained import StrictlyPretrained, load_pretrained


@MODELS.register_module()
class RecNeXt(recnext.RecNeXt, StrictlyPretrained):
    """The backbone of :class:`.recnext.RecNeXt` for configs.

    Args:
        arch: As for :class:`.recnext.RecNeXt`, and so are the others but for two.
        norm_cfg: Normalisation layers, as mmcv builds them.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)`` takes a released ImageNet file as it is; see
            :func:`.pretrained.read_pretrained`. Without it, PyTorch's default initialisation.

    Raises:
        UserError: an arch that makes no network, or an index out of range.
    """

    # mmengine's BaseModule has a setter without types: torch.jit.script would take its values for tensors.
    __jit_unused_properties__ = ['is_init']

    def __init__(
        self,
        arch: str | Mapping = 'm3',
        norm_cfg: Mapping = dict(type='BN'),
        init_cfg: dict | list[dict] | None = None,
        **kwargs: object,
    ) -> None:
        super().__init__(arch, norm=lambda channels: build_norm_layer(dict(norm_cfg), channels)[1], **kwargs)
        self.init_cfg = copy.deepcopy(init_cfg)

    def load_pretrained(self, checkpoint: str) -> None:
        """Load a file that must fit exactly (see :func:`.pretrained.read_pretrained`)."""
        load_pretrained(self, checkpoint)
