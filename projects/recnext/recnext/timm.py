"""RecNeXt in timm: ``recnext_m0`` ... ``recnext_a5``. Importing this module imports timm, and registers.

It is imported when timm is (see the package's ``__init__.py``): a user of mmseg does not wait for timm.
"""

import logging
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from .checkpoints.files import read_checkpoint
from .checkpoints.keys import (
    HEAD,
    LONGEST_KEY,
    check_weights_fit,
    convert_state_dict,
    detect_layout,
    get_state_dict,
    of_other_classes,
)
from .checkpoints.releases import read_releases
from .models.classifier import CLASS_TENSORS, TwoBranchHead
from .models.recnext import ARCHS, RecNeXt
from .utils.errors import UserError, printable

logger = logging.getLogger(__name__)

FIRST_CONV = 'stem.0.conv.weight'


class TimmRecNeXt(RecNeXt):
    """The same backbone with the classification head, and with the methods that timm's models have.

    Images (N, in_chans, H, W) to logits (N, num_classes), or in training to those of the labels' and the teacher's
    branch after ``set_distilled_training()``.

    Args:
        arch: Name of the variant.
        num_classes: 0 leaves out the head.
        in_chans: Channels of the images.
        global_pool: ``'avg'``, or ``''`` for no pooling.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth, the same in every block.
    """

    def __init__(
        self,
        arch: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(arch, in_channels=in_chans, drop_path_rate=drop_path_rate)
        channels = ARCHS[arch]['channels']
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = channels[-1]
        self.feature_info = [
            dict(num_chs=width, reduction=2 ** (stage + 2), module=f'stages.{stage}')
            for stage, width in enumerate(channels)
        ]
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head."""
        if global_pool is not None:
            if global_pool not in ('', 'avg'):
                raise UserError(f"global_pool is 'avg' or ''; found {global_pool!r}.")
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.stem[0].conv.weight
        head = TwoBranchHead(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head = head.to(device=like.device, dtype=like.dtype).train(self.training)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training gets the logits of both branches instead of their mean."""
        self.head.distilled_training = enable

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether activations are recomputed in the backward pass."""
        self.with_cp = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters belong to which depth, for learning rates by layer."""
        blocks = [(r'^stages\.(\d+)\.downsample', (0,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None)]
        return dict(stem='^stem', blocks=r'^stages\.(\d+)' if coarse else blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        """The feature map of the last stage."""
        return self.forward_stages(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """A feature map, pooled and classified."""
        if self.global_pool == 'avg':
            x = x.mean((2, 3))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of the stages ``indices``, all by default, and that of the last one; as in timm."""
        if output_fmt != 'NCHW':
            raise UserError(f'RecNeXt gives feature maps as NCHW; found {output_fmt}.')
        del norm  # there is none after the last stage
        stages = len(self.stages)
        taken, last = feature_take_indices(stages, indices)
        features = self.forward_stages(x, last + 1 if stop_early else stages)
        intermediates = [features[index] for index in taken]
        if intermediates_only:
            return intermediates
        return features[-1], intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of ``indices``, and the head."""
        del prune_norm
        taken, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0)
        return taken

    def switch_to_deploy(self) -> None:
        """Fold norms into convolutions, and the head's two branches into one linear layer. Idempotent."""
        super().switch_to_deploy()
        if isinstance(self.head, TwoBranchHead):
            self.head.switch_to_deploy()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Takes the weights of a classifier in any form, as released or of mmpretrain."""
        mine = {key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)}
        if mine and detect_layout(mine).kind == 'classifier':
            converted = convert_state_dict(mine, 'timm').state_dict
            for key in mine:
                del state_dict[prefix + key]
            state_dict.update({prefix + key: tensor for key, tensor in converted.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_pretrained(self, checkpoint: str) -> None:
        """Load a classifier from a file, in any known form.

        The stem is adapted to other ``in_chans``, as timm does; of a head for another number of classes the linear
        layers start anew, and the log names them.

        Raises:
            UserError: the file cannot be read, or the weights are of another variant.
        """
        weights = dict(convert_state_dict(get_state_dict(read_checkpoint(checkpoint)), 'timm').state_dict)
        own = self.state_dict()
        if self.in_chans != 3:
            weights[FIRST_CONV] = adapt_input_conv(self.in_chans, weights[FIRST_CONV])
        if self.num_classes == 0:
            left_out = [key for key in weights if key.startswith(HEAD)]
        else:
            left_out = of_other_classes(weights, own, CLASS_TENSORS)
        for key in left_out:
            del weights[key]
        check_weights_fit(weights, {key: own[key] for key in own if key not in left_out}, f'this {type(self).__name__}')
        self.load_state_dict({**own, **weights})
        if left_out:
            logger.warning('%s: left out %s', checkpoint, ', '.join(printable(key, LONGEST_KEY) for key in left_out))


def _cfg(**kwargs: object) -> dict:
    # As the released networks were trained and tested: DeiT's preparation of images.
    return dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation='bicubic',
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv='stem.0.conv',
        classifier=('head.head.linear', 'head.head_dist.linear'),
        license='apache-2.0',
        origin_url='https://github.com/suous/RecNeXt',
        paper_ids='arXiv:2412.19628',
        # Through load_pretrained() above, wherever the file is from.
        custom_load='hf',
        **kwargs,
    )


def _default_cfgs() -> dict:
    """Two sets of weights a variant: distilled, the default, and not."""
    urls = {release['name']: release['url'] for release in read_releases()}
    cfgs = {}
    for tag, suffix in (('dist_300e_in1k', 'distill_300e'), ('base_300e_in1k', 'without_distill_300e')):
        for arch in ARCHS:
            name, url = f'recnext_{arch}.{tag}', urls[f'recnext_{arch}_{suffix}']
            cfgs[name] = _cfg(hf_hub_id=f'suous/{name}', hf_hub_filename='model.safetensors', url=url)
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


def _create(arch: str, pretrained: bool = False, **kwargs: object) -> TimmRecNeXt:
    variant = f'recnext_{arch}'
    feature_cfg = dict(out_indices=(0, 1, 2, 3), feature_cls='getter')
    overlay = kwargs.pop('pretrained_cfg_overlay', None)
    if overlay and 'file' in overlay:
        # A file, too, through load_pretrained() above: timm would read it itself.
        overlay = dict(overlay, custom_load='hf')
    try:
        return build_model_with_cfg(
            partial(TimmRecNeXt, arch),
            variant,
            pretrained,
            feature_cfg=feature_cfg,
            pretrained_cfg_overlay=overlay,
            **kwargs,
        )
    except (OSError, RuntimeError) as error:
        if not pretrained or isinstance(error, torch.OutOfMemoryError):
            raise
        cfg = kwargs.get('pretrained_cfg')
        tag = getattr(cfg, 'tag', None) or 'dist_300e_in1k'
        raise UserError(
            f'The weights of {variant} cannot be had: {error}\n'
            f'  Wanted: suous/{variant}.{tag} of the Hugging Face hub, file model.safetensors.\n'
            "  Offline, name a file: timm.create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file='FILE'))"
        ) from None


def _register(arch: str) -> None:
    def create(pretrained: bool = False, **kwargs: object) -> TimmRecNeXt:
        return _create(arch, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = f'recnext_{arch}'
    create.__module__ = __name__
    create.__doc__ = f'RecNeXt-{arch.upper()} for timm; see :class:`TimmRecNeXt`.'
    globals()[create.__name__] = register_model(create)


for _arch in ARCHS:
    _register(_arch)
