"""The networks as an exporter takes them: wrappers around a model, captured by torch.export; the model is not changed."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .checkpoint import read_checkpoint
from .errors import UserError
from .models import build_without_weights
from .segmentor import FastEncoderDecoder

OUTPUTS = ('labels', 'logits', 'both')
PARTS = ('segmentor', 'backbone')
STRIDE = 32
"""The largest stride of the network, in pixels: image sizes are multiples of it."""


class ExportedSegmentor(nn.Module):
    """From pixels to labels: an RGB image (N, 3, H, W) with values from 0 to 255.

    Args:
        segmentor: In eval mode. Its normalisation goes into the graph.
        output: ``'labels'``: a tuple of the label maps (N, H, W), int32. ``'logits'``: of the logits (N, C, H/4, W/4), as
            the head gives them. ``'both'``: of labels, then logits.
        single: Give the label map of one image, (H, W).
    """

    def __init__(self, segmentor: FastEncoderDecoder, output: str = 'labels', single: bool = False) -> None:
        super().__init__()
        self.segmentor = segmentor
        self.single = single
        self.names = OUTPUTS[:2] if output == 'both' else (output,)

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


def load_segmentor(cfg: Config, checkpoint: str) -> FastEncoderDecoder:
    """The network of a config with the weights of a file that fits, in eval mode."""
    segmentor = build_without_weights(cfg.model)
    segmentor.load_state_dict(segmentor.fit(read_checkpoint(checkpoint)))
    return segmentor.eval()


def check_sizes(sizes: Sequence[tuple[int, int]]) -> None:
    """Make sure that images of these sizes (height, width) go through the network.

    Raises:
        UserError: one that is not a multiple of 32, or of 64 where there are several.
    """
    # With several sizes the scale of every resize must be known without knowing the size: a whole number.
    multiple, least = (STRIDE, STRIDE) if len(sizes) == 1 else (2 * STRIDE, 4 * STRIDE)
    wrong = [size for size in sizes if any(side % multiple or side < least for side in size)]
    if wrong:
        said = ', '.join(f'{height} x {width}' for height, width in wrong)
        several = f' Where several sizes are given, they are multiples of {multiple} from {least} up.'
        raise UserError(
            f'Height and width are multiples of {STRIDE}; found {said}.{several if len(sizes) > 1 else ""}\n'
            f'  The nearest: {", ".join(_nearest(size, multiple, least) for size in wrong)}'
        )
    if len(set(sizes)) < len(sizes):
        raise UserError('A size is given twice.')


def _nearest(size: tuple[int, int], multiple: int, least: int) -> str:
    return ' '.join(str(max(least, round(side / multiple) * multiple)) for side in size)


def capture(module: nn.Module, size: tuple[int, int], dynamic: Mapping[int, Dim] | None = None) -> ExportedProgram:
    """The graph of a wrapper for images (1, 3, H, W) by torch.export.

    Args:
        module: In eval mode, such as :class:`ExportedSegmentor`.
        size: (H, W) of the image.
        dynamic: Dimensions of the image that may change, by index.
    """
    image = torch.zeros(1, 3, *size)
    with torch.no_grad():
        program = torch.export.export(module.eval(), (image,), dynamic_shapes=(dict(dynamic),) if dynamic else None)
        # Folded Semantic FPN subtracts from the outermost lines of a map in place. Exporters know no views to write
        # into, and make a scatter of it, which phones do not accelerate.
        return program.run_decompositions({torch.ops.aten.slice_scatter.default: _slice_scatter})


def _slice_scatter(
    x: Tensor, lines: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """``x`` with ``lines`` in the place of its own from ``start`` on, by concatenation; ``end`` follows from them."""
    start = start or 0
    stop = start + lines.shape[dim]
    parts = x.narrow(dim, 0, start), lines, x.narrow(dim, stop, x.shape[dim] - stop)
    return torch.cat([part for part in parts if part.shape[dim] != 0], dim)
