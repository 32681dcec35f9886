"""RecNeXt: an image backbone with recursive token mixers.

Paper: `RecConv: Efficient Recursive Convolutions for Multi-Frequency Representations
<https://arxiv.org/abs/2412.19628>`_. Released weights: https://github.com/suous/RecNeXt.

The two families share everything but the token mixer: :class:`RecConv` in m0 ... m5, :class:`RecAttn` in
a0 ... a5. Parameters keep their released names; the exceptions stand in ``state_dict.rename``.

What timm runs is written so that ``torch.jit.script`` compiles it: a loop calls the modules of a whole list, not of a
slice, and a list is no condition.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer, is_norm
from mmcv.cnn.bricks import DropPath
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..utils.errors import UserError
from .archs import STAGES, get_arch
from .folding import fold_norm, is_foldable
from .pretrained import StrictlyPretrained, load_pretrained


class ConvNorm(nn.Sequential):
    """Convolution without bias, then normalisation; (N, in, H, W) to (N, out, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm_cfg: dict, **conv_args: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False, **conv_args)
        self.norm = build_norm_layer(norm_cfg, out_channels)[1]

    def switch_to_deploy(self) -> None:
        self.conv, self.norm = fold_norm(self.conv, self.norm), nn.Identity()


def mlp(channels: int, ratio: float, norm_cfg: dict) -> nn.Sequential:
    """Channel mixer: two 1×1 convolutions with int(ratio · channels) channels between them."""
    hidden = int(ratio * channels)
    return nn.Sequential(ConvNorm(channels, hidden, 1, norm_cfg), nn.GELU(), ConvNorm(hidden, channels, 1, norm_cfg))


class RecConv(nn.Module):
    """Recursive convolution: one depthwise pyramid, made by applying the same stride-2 convolution ``levels`` times.

    Args:
        channels: C of the (N, C, H, W) input and output.
        levels: Depth of the recursion.
        kernel_size: Of every convolution.
    """

    def __init__(self, channels: int, levels: int, kernel_size: int = 5) -> None:
        super().__init__()
        conv = dict(kernel_size=kernel_size, padding=kernel_size // 2, groups=channels, bias=False)
        self.down = nn.Conv2d(channels, channels, stride=2, **conv)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, **conv) for _ in range(levels + 1))

    def forward(self, x: Tensor) -> Tensor:
        pyramid = [x]
        for _ in self.convs[1:]:
            pyramid.append(self.down(pyramid[-1]))
        y = pyramid.pop()
        for conv in self.convs:
            y = conv(y)
            if len(pyramid) > 0:
                finer = pyramid.pop()
                y = finer + F.interpolate(y, size=finer.shape[2:], mode='bilinear', align_corners=False)
        return y


class LinearAttention(nn.Module):
    """Attention with a positive feature map, elu + 1, instead of a softmax, and the input itself as values.

    Both orders of the product are the same function; the released network takes the (n × n) matrix first where
    there are few tokens.

    Args:
        channels: C of the (N, C, H, W) input and output; n = H · W tokens.
        heads: Number of heads; divides C.
        tokens_first: Whether the (n × n) matrix is made instead of the (C / heads)² one.
        norm_cfg: Normalisation of the query/key projection and of the positional encoding.
    """

    eps: Final = 1e-6

    def __init__(self, channels: int, heads: int, tokens_first: bool, norm_cfg: dict) -> None:
        super().__init__()
        if channels % heads or channels % 2:
            raise UserError(f'RecAttn splits its channels in {heads} heads; found {channels} channels.')
        self.heads = heads
        self.tokens_first = tokens_first
        self.qk = ConvNorm(channels, 2 * channels, 1, norm_cfg, groups=2)
        self.pe = ConvNorm(channels, channels, 3, norm_cfg, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        n = height * width
        scale = n**-0.5
        # (batch, heads, C / heads, n)
        q, k = (F.elu(self.qk(x)) + 1).reshape(batch, 2, self.heads, -1, n).unbind(1)
        v = x.reshape(batch, self.heads, -1, n)
        if self.tokens_first:
            weights = q.mT @ k
            weights = weights / (weights.mean(dim=-1, keepdim=True) + self.eps)
            y = (weights * scale) @ (v * scale).mT
        else:
            y = q.mT @ ((k * scale) @ (v * scale).mT)
            y = y / (q.mT @ k.mean(dim=-1, keepdim=True) + self.eps)
        return y.mT.reshape(x.shape) + self.pe(x)


class RecAttn(nn.Module):
    """Recursive attention: linear attention at half resolution, added to the input before a depthwise convolution.

    Args:
        channels: C of the (N, C, H, W) input and output.
        heads: See :class:`LinearAttention`.
        tokens_first: See :class:`LinearAttention`.
        norm_cfg: Normalisation of every convolution.
        kernel_size: Of the two depthwise convolutions.
    """

    def __init__(self, channels: int, heads: int, tokens_first: bool, norm_cfg: dict, kernel_size: int = 5) -> None:
        super().__init__()
        self.down = nn.Sequential(
            ConvNorm(channels, channels, kernel_size, norm_cfg, stride=2, groups=channels),
            LinearAttention(channels, heads, tokens_first, norm_cfg),
        )
        self.conv = ConvNorm(channels, channels, kernel_size, norm_cfg, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + F.interpolate(self.down(x), size=x.shape[2:], mode='nearest'))


class Block(nn.Module):
    """x + channel_mixer(norm(token_mixer(x))); (N, C, H, W) in and out. RecAttn ends in a norm of its own."""

    def __init__(self, stage: int, channels: int, arch: Mapping, drop_path_rate: float, norm_cfg: dict) -> None:
        super().__init__()
        if arch['token_mixer'] == 'conv':
            self.token_mixer = RecConv(channels, levels=STAGES - stage)
            self.norm = build_norm_layer(norm_cfg, channels)[1]
        else:
            last = stage == STAGES - 1
            self.token_mixer = RecAttn(channels, heads=2 ** (stage + 1), tokens_first=last, norm_cfg=norm_cfg)
            self.norm = nn.Identity()
        self.channel_mixer = mlp(channels, arch['mlp_ratio'], norm_cfg)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.channel_mixer(self.norm(self.token_mixer(x))))

    def switch_to_deploy(self) -> None:
        if isinstance(self.token_mixer, RecConv):
            convs = self.token_mixer.convs
            convs[-1], self.norm = fold_norm(convs[-1], self.norm), nn.Identity()


class Downsample(nn.Module):
    """(N, C, H, W) to (N, 2C, ceil(H / 2), ceil(W / 2)), with a channel mixer around which the result is added."""

    def __init__(self, in_channels: int, mlp_ratio: float, norm_cfg: dict) -> None:
        super().__init__()
        channels = 2 * in_channels
        self.token_mixer = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, groups=in_channels)
        self.norm = build_norm_layer(norm_cfg, channels)[1]
        self.channel_mixer = mlp(channels, mlp_ratio, norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.token_mixer(x))
        return x + self.channel_mixer(x)

    def switch_to_deploy(self) -> None:
        if isinstance(self.token_mixer, nn.Conv2d):
            self.token_mixer, self.norm = fold_norm(self.token_mixer, self.norm), nn.Identity()


class Stage(nn.Module):
    """A downsampler (none in stage 0), then the blocks."""

    def __init__(self, stage: int, arch: Mapping, drop_path_rate: float, norm_cfg: dict) -> None:
        super().__init__()
        channels = arch['channels'][stage]
        self.downsample = Downsample(channels // 2, arch['mlp_ratio'], norm_cfg) if stage else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(stage, channels, arch, drop_path_rate, norm_cfg) for _ in range(arch['depths'][stage])
        )

    def forward(self, x: Tensor, with_cp: bool = False) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if with_cp and x.requires_grad and not torch.jit.is_scripting():
                x = _recomputed(block, x)
            else:
                x = block(x)
        return x


# In mmengine's own registry, which mmseg's and mmpretrain's fall back on.
@MODELS.register_module()
class RecNeXt(StrictlyPretrained):
    """The backbone: an image (N, in_channels, H, W) of any size from 1 × 1 to a tuple of feature maps.

    Feature i has ``channels[i]`` channels and size ceil(H / 2^(i + 2)) × ceil(W / 2^(i + 2)).

    Args:
        arch: Name of a released variant, ``'m0'`` ... ``'m5'``, ``'a0'`` ... ``'a5'``, or a dict with the keys
            ``channels``, ``depths``, ``mlp_ratio`` and ``token_mixer`` that :data:`archs.ARCHS` explains.
        in_channels: Channels of the image.
        out_indices: Stages whose outputs are returned, 0 to 3.
        norm_cfg: Normalisation layers. Only batch normalisation can be folded by :meth:`switch_to_deploy`.
        norm_eval: Whether the norms keep their statistics in training. The released networks trained them.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages.
        drop_path_rate: Stochastic depth, the same in every block.
        with_cp: Whether activations are recomputed in the backward pass to save memory. Gradients and norm
            statistics are the same either way.
        init_cfg: ``dict(type='Pretrained', checkpoint=FILE)`` takes a released ImageNet file as it is; see
            :func:`pretrained.read_pretrained`. Without it, PyTorch's default initialisation.

    Raises:
        UserError: an arch that makes no network, or an index out of range.
    """

    # mmengine's BaseModule has a setter without types: torch.jit.script would take its values for tensors.
    __jit_unused_properties__ = ['is_init']

    def __init__(
        self,
        arch: str | Mapping = 'm3',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norm_cfg: Mapping = dict(type='BN'),
        norm_eval: bool = False,
        frozen_stages: int = -1,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        arch = get_arch(arch)
        if isinstance(out_indices, int) or not out_indices or any(index not in range(STAGES) for index in out_indices):
            raise UserError(f'out_indices names stages 0 to {STAGES - 1}; found {out_indices}.')
        if frozen_stages not in range(-1, STAGES + 1):
            raise UserError(f'frozen_stages lies between -1 and {STAGES}; found {frozen_stages}.')
        norm_cfg = dict(norm_cfg)
        width = arch['channels'][0]
        self.stem = nn.Sequential(
            ConvNorm(in_channels, width // 2, 3, norm_cfg, stride=2),
            nn.GELU(),
            ConvNorm(width // 2, width, 3, norm_cfg, stride=2),
        )
        self.stages = nn.ModuleList(Stage(stage, arch, drop_path_rate, norm_cfg) for stage in range(STAGES))
        self.out_indices = tuple(out_indices)
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = self.forward_stages(x)
        return tuple(features[index] for index in self.out_indices)

    def forward_stages(self, x: Tensor, stages: int = STAGES) -> list[Tensor]:
        """The feature maps of the first ``stages`` stages."""
        x = self.stem(x)
        features = []
        for index, stage in enumerate(self.stages):
            if index < stages:
                x = stage(x, self.with_cp)
                features.append(x)
        return features

    def load_pretrained(self, checkpoint: str) -> None:
        """Load a file that must fit exactly (see :func:`pretrained.read_pretrained`)."""
        load_pretrained(self, checkpoint)

    def train(self, mode: bool = True) -> 'RecNeXt':
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages >= 0:
            for module in (self.stem, *self.stages[: self.frozen_stages]):
                module.eval()
                module.requires_grad_(False)

    def switch_to_deploy(self) -> None:
        """Fold every norm into the convolution before it. Idempotent.

        Raises:
            UserError: the network is in training mode, or has a norm that cannot be folded.
        """
        if any(module.training for module in self.modules()):
            raise UserError('switch_to_deploy() fixes the norm statistics for good: call .eval() on the network first.')
        other = {type(m).__name__ for m in self.modules() if is_norm(m) and not is_foldable(m)}
        if other:
            raise UserError(f'Only batch normalisation can be folded into a convolution; found {", ".join(other)}.')
        for module in list(self.modules())[1:]:
            if hasattr(module, 'switch_to_deploy'):
                module.switch_to_deploy()
        # The modules that took the norms' places are new, and new modules are in training mode.
        self.eval()


def _recomputed(block: Block, x: Tensor) -> Tensor:
    # The second forward pass must not count into the running statistics once more.
    contexts = lambda: (contextlib.nullcontext(), _untracked_statistics(block))  # noqa: E731
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _untracked_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms inside ``module`` normalise as ever, but leave their running statistics as they are.

    The statistics must still be handed to the operation: autograd saves them, and counts what was saved.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)
