"""RecNeXt: an image backbone with recursive token mixers, in torch alone.

Paper: `RecConv: Efficient Recursive Convolutions for Multi-Frequency Representations
<https://arxiv.org/abs/2412.19628>`_. Released weights: https://github.com/suous/RecNeXt.

The two families share everything but the token mixer: :class:`RecConv` in m0 ... m5, :class:`RecAttn` in
a0 ... a5. Parameters keep their released names; the exceptions stand in ``checkpoints.keys.rename``.

What timm runs is written so that ``torch.jit.script`` compiles it: a loop calls the modules of a whole list, not of a
slice, and a list is no condition.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.checkpoint import checkpoint

from ..utils.errors import UserError
from .folding import DepthwisePair, fold_norm, is_foldable

Norm = Callable[[int], nn.Module]
"""Makes a normalisation layer for a number of channels."""

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm)

ARCHS = {
    f'{family}{size}': dict(
        channels=tuple(width * 2**stage for stage in range(4)),
        depths=depths,
        mlp_ratio=mlp_ratio[family],
        token_mixer=token_mixer,
    )
    for family, token_mixer in (('m', 'conv'), ('a', 'attn'))
    for size, width, depths, mlp_ratio in (
        (0, 40, (2, 2, 9, 1), dict(m=2, a=2)),
        (1, 48, (3, 3, 15, 2), dict(m=2, a=2)),
        (2, 56, (3, 3, 15, 2), dict(m=2, a=2)),
        (3, 64, (3, 3, 13, 2), dict(m=2, a=1.875)),
        (4, 64, (5, 5, 25, 4), dict(m=2, a=1.875)),
        (5, 80, (7, 7, 35, 2), dict(m=2, a=1.875)),
    )
}
"""``m0`` ... ``m5`` and ``a0`` ... ``a5``. ``channels`` and ``depths``: width and number of blocks of each of
the four stages. ``mlp_ratio``: hidden channels of a channel mixer for each of its own. ``token_mixer``: ``'conv'``
(RecConv) or ``'attn'`` (RecAttn)."""

STAGES = 4
TOKEN_MIXERS = ('conv', 'attn')


def get_arch(arch: str | Mapping) -> dict:
    """Return the settings of ``arch``: a name in :data:`ARCHS`, or a dict with exactly the keys that those have.

    Raises:
        UserError: an unknown name, a missing or unknown key, or a value that makes no network.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise UserError(f'Unknown RecNeXt arch {arch!r}. Choose one of: {", ".join(ARCHS)}; or give a dict.')
        return ARCHS[arch]
    keys = set(ARCHS['m0'])
    if not isinstance(arch, Mapping):
        raise UserError(f'A RecNeXt arch is a name or a dict; found {arch!r}.')
    if set(arch) != keys:
        raise UserError(f'A RecNeXt arch dict has the keys {sorted(keys)}; found {sorted(arch)}.')
    for key in ('channels', 'depths'):
        numbers = arch[key]
        whole = isinstance(numbers, Sequence) and all(isinstance(number, int) and number > 0 for number in numbers)
        if not whole or len(numbers) != STAGES:
            raise UserError(f'A RecNeXt arch has {STAGES} stages; found {key} {numbers}.')
    if arch['channels'][0] < 2 or int(arch['mlp_ratio'] * arch['channels'][0]) < 1:
        raise UserError(f'No channels are left with channels {arch["channels"]} and mlp_ratio {arch["mlp_ratio"]}.')
    if arch['token_mixer'] not in TOKEN_MIXERS:
        raise UserError(f'token_mixer is one of {", ".join(TOKEN_MIXERS)}; found {arch["token_mixer"]!r}.')
    for stage, (width, before) in enumerate(zip(arch['channels'][1:], arch['channels']), start=1):
        if width != 2 * before:
            raise UserError(
                f'Every stage of a RecNeXt has twice the channels of the one before; stage {stage} has {width} '
                f'after {before}.'
            )
    return dict(arch)


class DropPath(nn.Module):
    """Stochastic depth: in training a sample (dimension 0) is zeroed at a rate, and the others are scaled to make up.

    The random draws and the rounding are those of mmcv's ``DropPath``.

    Args:
        rate: Share of the samples that is zeroed, 0 to 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        kept = (keep + torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)).floor()
        return x.div(keep) * kept


class ConvNorm(nn.Sequential):
    """Convolution without bias, then normalisation; (N, in, H, W) to (N, out, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: Norm, **conv_args: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False, **conv_args)
        self.norm = norm(out_channels)

    def switch_to_deploy(self) -> None:
        self.conv, self.norm = fold_norm(self.conv, self.norm), nn.Identity()


def mlp(channels: int, ratio: float, norm: Norm) -> nn.Sequential:
    """Channel mixer: two 1×1 convolutions with int(ratio · channels) channels between them."""
    hidden = int(ratio * channels)
    return nn.Sequential(ConvNorm(channels, hidden, 1, norm), nn.GELU(), ConvNorm(hidden, channels, 1, norm))


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
        norm: Normalisation of the query/key projection and of the positional encoding.
    """

    eps: Final = 1e-6

    def __init__(self, channels: int, heads: int, tokens_first: bool, norm: Norm) -> None:
        super().__init__()
        if channels % heads or channels % 2:
            raise UserError(f'RecAttn splits its channels in {heads} heads; found {channels} channels.')
        self.heads = heads
        self.tokens_first = tokens_first
        self.qk = ConvNorm(channels, 2 * channels, 1, norm, groups=2)
        self.pe = ConvNorm(channels, channels, 3, norm, groups=channels)

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
        norm: Normalisation of every convolution.
        kernel_size: Of the two depthwise convolutions.
    """

    def __init__(self, channels: int, heads: int, tokens_first: bool, norm: Norm, kernel_size: int = 5) -> None:
        super().__init__()
        self.down = nn.Sequential(
            ConvNorm(channels, channels, kernel_size, norm, stride=2, groups=channels),
            LinearAttention(channels, heads, tokens_first, norm),
        )
        self.conv = ConvNorm(channels, channels, kernel_size, norm, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + F.interpolate(self.down(x), size=x.shape[2:], mode='nearest'))


class Block(nn.Module):
    """x + channel_mixer(norm(token_mixer(x))); (N, C, H, W) in and out. RecAttn ends in a norm of its own."""

    def __init__(self, stage: int, channels: int, arch: Mapping, drop_path_rate: float, norm: Norm) -> None:
        super().__init__()
        if arch['token_mixer'] == 'conv':
            self.token_mixer = RecConv(channels, levels=STAGES - stage)
            self.norm = norm(channels)
        else:
            last = stage == STAGES - 1
            self.token_mixer = RecAttn(channels, heads=2 ** (stage + 1), tokens_first=last, norm=norm)
            self.norm = nn.Identity()
        self.channel_mixer = mlp(channels, arch['mlp_ratio'], norm)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.channel_mixer(self.norm(self.token_mixer(x))))

    def switch_to_deploy(self) -> None:
        if isinstance(self.token_mixer, RecConv):
            convs = self.token_mixer.convs
            convs[-1], self.norm = fold_norm(convs[-1], self.norm), nn.Identity()


class Downsample(nn.Module):
    """(N, C, H, W) to (N, 2C, ceil(H / 2), ceil(W / 2)), with a channel mixer around which the result is added."""

    def __init__(self, in_channels: int, mlp_ratio: float, norm: Norm) -> None:
        super().__init__()
        channels = 2 * in_channels
        self.token_mixer = nn.Conv2d(in_channels, channels, 7, stride=2, padding=3, groups=in_channels)
        self.norm = norm(channels)
        self.channel_mixer = mlp(channels, mlp_ratio, norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.token_mixer(x))
        return x + self.channel_mixer(x)

    def switch_to_deploy(self) -> None:
        if isinstance(self.token_mixer, nn.Conv2d):
            self.token_mixer, self.norm = fold_norm(self.token_mixer, self.norm), nn.Identity()


class Stage(nn.Module):
    """A downsampler (none in stage 0), then the blocks."""

    def __init__(self, stage: int, arch: Mapping, drop_path_rate: float, norm: Norm) -> None:
        super().__init__()
        channels = arch['channels'][stage]
        self.downsample = Downsample(channels // 2, arch['mlp_ratio'], norm) if stage else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(stage, channels, arch, drop_path_rate, norm) for _ in range(arch['depths'][stage])
        )

    def forward(self, x: Tensor, with_cp: bool = False) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if with_cp and x.requires_grad and not torch.jit.is_scripting():
                x = _recomputed(block, x)
            else:
                x = block(x)
        return x


class RecNeXt(nn.Module):
    """The backbone: an image (N, in_channels, H, W) of any size from 1 × 1 to a tuple of feature maps.

    Feature i has ``channels[i]`` channels and size ceil(H / 2^(i + 2)) × ceil(W / 2^(i + 2)).

    Args:
        arch: Name of a released variant, ``'m0'`` ... ``'m5'``, ``'a0'`` ... ``'a5'``, or a dict with the keys
            ``channels``, ``depths``, ``mlp_ratio`` and ``token_mixer`` that :data:`ARCHS` explains.
        in_channels: Channels of the image.
        out_indices: Stages whose outputs are returned, 0 to 3.
        norm: Makes a normalisation layer for a number of channels. Only batch normalisation can be folded by
            :meth:`switch_to_deploy`.
        norm_eval: Whether the norms keep their statistics in training. The released networks trained them.
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages.
        drop_path_rate: Stochastic depth, the same in every block.
        with_cp: Whether activations are recomputed in the backward pass to save memory. Gradients and norm
            statistics are the same either way.

    Raises:
        UserError: an arch that makes no network, or an index out of range.
    """

    def __init__(
        self,
        arch: str | Mapping = 'm3',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        norm: Norm = nn.BatchNorm2d,
        norm_eval: bool = False,
        frozen_stages: int = -1,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        arch = get_arch(arch)
        if isinstance(out_indices, int) or not out_indices or any(index not in range(STAGES) for index in out_indices):
            raise UserError(f'out_indices names stages 0 to {STAGES - 1}; found {out_indices}.')
        if frozen_stages not in range(-1, STAGES + 1):
            raise UserError(f'frozen_stages lies between -1 and {STAGES}; found {frozen_stages}.')
        width = arch['channels'][0]
        self.stem = nn.Sequential(
            ConvNorm(in_channels, width // 2, 3, norm, stride=2),
            nn.GELU(),
            ConvNorm(width // 2, width, 3, norm, stride=2),
        )
        self.stages = nn.ModuleList(Stage(stage, arch, drop_path_rate, norm) for stage in range(STAGES))
        self.out_indices = tuple(out_indices)
        self.norm_eval = norm_eval
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return a feature map (N, channels[i], ceil(H / 2^(i + 2)), ceil(W / 2^(i + 2))) for each i of out_indices."""
        features = self.forward_stages(x)
        return tuple(features[index] for index in self.out_indices)

    def forward_stages(self, x: Tensor, stages: int = STAGES) -> list[Tensor]:
        """Return the feature maps of the first ``stages`` stages."""
        x = self.stem(x)
        features = []
        for index, stage in enumerate(self.stages):
            if index < stages:
                x = stage(x, self.with_cp)
                features.append(x)
        return features

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
        other = {type(m).__name__ for m in self.modules() if isinstance(m, NORMS) and not is_foldable(m)}
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


def pair_downsampling(network: nn.Module) -> None:
    """Make a :class:`DepthwisePair` of every folded downsampling convolution on a CPU; in place, idempotent."""
    for module in network.modules():
        if isinstance(module, Downsample) and isinstance(module.norm, nn.Identity):
            conv = module.token_mixer
            if isinstance(conv, nn.Conv2d) and conv.weight.device.type == 'cpu':
                module.token_mixer = DepthwisePair(conv)
