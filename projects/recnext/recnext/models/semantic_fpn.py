"""Semantic FPN on RecNeXt, in torch alone: FPN, FPNHead and the whole segmentor.

Papers: `Feature Pyramid Networks <https://arxiv.org/abs/1612.03144>`_, `Panoptic Feature Pyramid Networks
<https://arxiv.org/abs/1901.02446>`_. The parameters are called, ordered and shaped as those of mmseg's ``FPN``,
``FPNHead`` and ``EncoderDecoder``, so that one state dict fits both; the outputs are theirs, bit for bit.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..utils.errors import UserError
from .deployable import Deployable, to_float32
from .folding import FoldedFPN, FoldedLevel, fold_levels, fold_norm
from .label_map import ResizeStep, label_map, resize_all
from .preprocess import Prepared, Preprocess
from .recnext import RecNeXt, get_arch

STRIDES = (4, 8, 16, 32)
"""Pixels of the image to a cell of each of RecNeXt's feature maps, along a side."""


class ConvBlock(nn.Module):
    """Convolution, and in the head batch normalisation and ReLU; named as the parts of mmcv's ``ConvModule``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, normalised: bool = False) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=not normalised)
        self.bn = nn.BatchNorm2d(out_channels) if normalised else nn.Identity()
        self.activate = nn.ReLU(inplace=True) if normalised else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activate(self.bn(self.conv(x)))

    def switch_to_deploy(self) -> None:
        self.conv, self.bn = fold_norm(self.conv, self.bn), nn.Identity().train(self.training)


class FPN(nn.Module):
    """Feature pyramid: feature maps (N, in_channels[i], H_i, W_i) to as many maps (N, out_channels, H_i, W_i)."""

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvBlock(channels, out_channels, 1) for channels in in_channels)
        self.fpn_convs = nn.ModuleList(ConvBlock(out_channels, out_channels, 3) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        merged = [lateral(feature) for lateral, feature in zip(self.lateral_convs, features)]
        for index in range(len(merged) - 1, 0, -1):
            finer = merged[index - 1]
            merged[index - 1] = finer + F.interpolate(merged[index], size=finer.shape[2:], mode='nearest')
        return tuple(conv(map_) for conv, map_ in zip(self.fpn_convs, merged))


class FPNHead(nn.Module):
    """Semantic FPN's head: each map is brought to the size of the first by 3×3 convolutions and upsampling, then all
    are added and classified.

    (N, in_channels, H_i, W_i) of strides :data:`STRIDES` to logits (N, out_channels, H_0, W_0).
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, out_channels, 1)
        self.dropout = nn.Dropout2d(dropout)
        self.scale_heads = nn.ModuleList()
        for stride in STRIDES:
            doublings = int(math.log2(stride / STRIDES[0]))
            layers: list[nn.Module] = []
            for layer in range(max(1, doublings)):
                layers.append(ConvBlock(channels if layer else in_channels, channels, 3, normalised=True))
                if doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode='bilinear', align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        out = self.scale_heads[0](maps[0])
        for scale_head, map_ in zip(self.scale_heads[1:], maps[1:]):
            scaled = scale_head(map_)
            out = out + F.interpolate(scaled, size=out.shape[2:], mode='bilinear', align_corners=False)
        return self.conv_seg(self.dropout(out))


class RecNeXtSegmentor(Deployable, nn.Module):
    """RecNeXt with Semantic FPN.

    Images (N, in_channels, H, W), RGB, normalised, to logits (N, classes, ceil(H / 4), ceil(W / 4)). Trained and
    released networks have images whose sides are multiples of 32.

    Args:
        arch: See :class:`.recnext.RecNeXt`.
        num_classes: Of the label maps.
        in_channels: Of the images.
        fpn_channels: Width of FPN.
        head_channels: Width of FPNHead.
        threshold: None has one logit for each class. A number tells two classes apart by a single logit: the second
            class is where its sigmoid is above the threshold.
        preprocess: From images to what the network sees.

    Raises:
        UserError: an arch that makes no network, or a threshold with another number of classes than two.
    """

    def __init__(
        self,
        arch: str | Mapping = 'm3',
        num_classes: int = 150,
        in_channels: int = 3,
        fpn_channels: int = 256,
        head_channels: int = 128,
        threshold: float | None = None,
        preprocess: Preprocess = Preprocess(),
    ) -> None:
        super().__init__()
        if threshold is not None and num_classes != 2:
            raise UserError(f'A threshold tells two classes apart; found {num_classes} classes.')
        self.num_classes = num_classes
        self.threshold = threshold
        self.preprocess = preprocess
        out_channels = num_classes if threshold is None else 1
        self.backbone = RecNeXt(arch, in_channels)
        self.neck: nn.Module = FPN(get_arch(arch)['channels'], fpn_channels)
        self.decode_head = FPNHead(fpn_channels, head_channels, out_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, classes, ceil(H / 4), ceil(W / 4)) of images (N, in_channels, H, W)."""
        return self.forward_logits(images)

    def forward_logits(self, inputs: Tensor) -> Tensor:
        return to_float32(self.decode_head(self.neck(self.backbone(self.to_input(inputs)))))

    def parts(self) -> dict[str, nn.Module]:
        return dict(backbone=self.backbone, neck=self.neck, head=self.decode_head)

    def fuse_norms(self) -> None:
        for module in self.decode_head.modules():
            if isinstance(module, ConvBlock):
                module.switch_to_deploy()

    def fuse_head(self) -> None:
        """Fold FPN and FPNHead into each other where that pays: see :mod:`.folding`."""
        if isinstance(self.neck, FoldedFPN):
            return
        self.fuse_norms()
        firsts = [(scale_head[0].conv, scale_head[0].activate) for scale_head in self.decode_head.scale_heads]
        laterals, convs = ([block.conv for block in part] for part in (self.neck.lateral_convs, self.neck.fpn_convs))
        levels = fold_levels(laterals, convs, firsts)
        for level, scale_head in zip(levels, self.decode_head.scale_heads):
            if isinstance(level, FoldedLevel):
                scale_head[0] = nn.Identity()
        self.neck = FoldedFPN(levels)
        self.eval()

    @property
    def calibration_side(self) -> int:
        """Pixels of the short side of the images that 8 bits are calibrated on."""
        return min(self.preprocess.scale or (super().calibration_side,))

    def to_network(self, image: np.ndarray) -> Tensor:
        images = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        return self.preprocess.normalise(images.to(next(self.parameters()).device))

    def prepare(self, image: np.ndarray) -> Prepared:
        """Return an image (H, W, channels), RGB, uint8, ready for :meth:`label_maps`; thread-safe."""
        return self.preprocess.prepare(image)

    @torch.no_grad()
    def label_maps(self, batch: Sequence[Prepared]) -> list[Tensor]:
        """Return the label map (H, W), int64, of each image in its original size; images of one size share a batch."""
        found: dict[int, Tensor] = {}
        device = next(self.parameters()).device
        for shape in dict.fromkeys(one.inputs.shape for one in batch):
            indices = [index for index, one in enumerate(batch) if one.inputs.shape == shape]
            images = torch.stack([batch[index].inputs for index in indices]).to(device)
            logits = self.check_finite(self.forward_logits(self.preprocess.normalise(images)))
            for index, single in zip(indices, logits):
                # As mmseg does: to the size of the network's input first, then to the original size.
                found[index] = self._label_map(single, (ResizeStep(tuple(shape[1:])), ResizeStep(batch[index].size)))
        return [found[index] for index in range(len(batch))]

    def _label_map(self, logits: Tensor, steps: tuple[ResizeStep, ...]) -> Tensor:
        if self.threshold is None:
            return label_map(logits, steps)
        return (resize_all(logits, steps)[0].sigmoid() > self.threshold).long()
