"""The networks as an exporter takes them: wrappers around a model, which stays as it is."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..openmmlab.segmentor import FastEncoderDecoder, takes_rgb


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
        x = image if takes_rgb(preprocessor) else image.flip(1)
        if preprocessor._enable_normalize:
            x = (x - preprocessor.mean) / preprocessor.std
        logits = self.segmentor.forward_logits(x)
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


class ArgmaxOverLast(TorchFunctionMode):
    """While a network is captured, its argmax over the channels becomes one over the last dimension: the same labels.

    For runtimes whose convolutions have the channels last: they take an argmax over the second dimension in large steps
    through the memory, or turn all scores round before it.
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is Tensor.argmax and args[1:] == (1,):
            return args[0].movedim(1, -1).argmax(-1)
        return func(*args, **(kwargs or {}))


Wrapper = ExportedSegmentor | ExportedBackbone
"""What is exported. Its ``names`` are those of the outputs."""
