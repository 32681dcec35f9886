"""The networks as an exporter takes them: wrappers around a model, captured by torch.export, the model unchanged."""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from mmseg.models.utils import Upsample
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..models.segmentor import FastEncoderDecoder


class ExportedSegmentor(nn.Module):
    """From pixels to labels: an RGB image (N, 3, H, W) with values from 0 to 255.

    Args:
        segmentor: In eval mode. Its normalisation goes into the graph.
        output: ``'labels'``: a tuple of the label maps (N, H, W), int32. ``'logits'``: of the logits (N, C, H/4, W/4),
            as the head gives them. ``'both'``: of labels, then logits.
        single: Give the label map of one image, (H, W).
    """

    def __init__(self, segmentor: FastEncoderDecoder, output: str = 'labels', single: bool = False) -> None:
        super().__init__()
        self.segmentor = segmentor
        self.single = single
        self.names = ('labels', 'logits') if output == 'both' else (output,)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        preprocessor = self.segmentor.data_preprocessor
        # The mean is in the order of the network's channels: RGB, unless the network takes what cv2 reads.
        x = image if preprocessor.channel_conversion else image.flip(1)
        if preprocessor._enable_normalize:
            x = (x - preprocessor.mean) / preprocessor.std
        logits = self.segmentor.network(x)
        outs = dict(logits=logits)
        if 'labels' in self.names:
            scores = F.interpolate(
                logits, size=image.shape[2:], mode='bilinear', align_corners=self.segmentor.align_corners
            )
            binary = scores.shape[1] == 1
            labels = scores[:, 0].sigmoid() > self.segmentor.decode_head.threshold if binary else scores.argmax(1)
            outs['labels'] = labels[0].int() if self.single else labels.int()
        return tuple(outs[name] for name in self.names)


class ExportedBackbone(nn.Module):
    """The bare backbone, as the published latencies measured it: a normalised image (N, 3, H, W) to its features."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.names = tuple(f'feature_{index}' for index in backbone.out_indices)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.backbone(image)


Wrapper = ExportedSegmentor | ExportedBackbone
"""What is exported. Its ``names`` are those of the outputs."""


def capture(wrapper: Wrapper, size: tuple[int, int], dynamic: Mapping[int, Dim] | None = None) -> ExportedProgram:
    """The graph of a wrapper for images (N, 3, H, W) by torch.export; of one image, where N is not dynamic.

    Args:
        wrapper: Its network is in eval mode.
        size: (H, W) of the image.
        dynamic: Dimensions of the image that may change, by index.
    """
    dynamic = dict(dynamic or {})
    # A dimension that is 1 when a graph is captured is 1 for good.
    image = torch.zeros(2 if 0 in dynamic else 1, 3, *size)
    if dynamic:
        wrapper = with_factors(wrapper)
    with torch.no_grad():
        program = torch.export.export(wrapper.eval(), (image,), dynamic_shapes=(dynamic,) if dynamic else None)
        # Folded Semantic FPN subtracts from the outermost lines of a map in place. Exporters know no views to write
        # into, and make a scatter of it, which phones do not accelerate.
        return program.run_decompositions({torch.ops.aten.slice_scatter.default: _slice_scatter})


def with_factors(module: nn.Module) -> nn.Module:
    """A copy in which mmseg's Upsample enlarges by its factor.

    Its own way is to compute the size as a number, and a graph keeps the number of the image that it was captured with.
    """
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Upsample) and not child.size:
                factor = nn.Upsample(
                    scale_factor=child.scale_factor, mode=child.mode, align_corners=child.align_corners
                )
                setattr(parent, name, factor)
    return module


def _slice_scatter(
    x: Tensor, lines: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """``x`` with ``lines`` in the place of its own from ``start`` on, by concatenation; ``end`` follows from them."""
    start = start or 0
    stop = start + lines.shape[dim]
    parts = x.narrow(dim, 0, start), lines, x.narrow(dim, stop, x.shape[dim] - stop)
    return torch.cat([part for part in parts if part.shape[dim] != 0], dim)
