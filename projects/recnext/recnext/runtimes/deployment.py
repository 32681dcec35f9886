"""The form in which a trained network runs fastest: folded, converted, reordered, in another engine."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.deployable import FUSE, Deployable
from ..models.recnext import pair_downsampling
from ..utils.devices import SLOW_IN_16_BITS, lacks_half_precision
from ..utils.errors import UserError

logger = logging.getLogger(__name__)

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
"""Floating-point types by the names that the tools use."""

PRECISIONS = (*DTYPES, 'int8')

ENGINES = ('torch', 'compile', 'cudagraph', 'openvino', 'onnxruntime')
"""What a network runs in, from normalised pixels to logits."""


@dataclass(frozen=True)
class Deployment:
    """A form to run a trained network in. The default is the fastest that gives mmseg's label maps.

    Args:
        fuse: What to fold: ``'none'``, ``'norms'`` or ``'all'``; see :meth:`Deployable.switch_to_deploy`.
        precision: Of weights and activations, one of :data:`PRECISIONS`; not every engine has each.
        channels_last: Keep weights and activations in channels-last order; OpenVINO and ONNX Runtime choose theirs.
        engine: One of :data:`ENGINES`. ``'cudagraph'`` records what runs on an NVIDIA GPU: see
            :class:`.GraphedNetwork`. ``'compile'`` is torch.compile there and on other accelerators, and takes a
            minute or more when the first images come. On the processor it and those that are not PyTorch convert the
            network when images come, and find it in a cache the next time: see :class:`.ConvertedNetwork`.
        calibrate: Folder of images like those to come, for ``'int8'``.
        keep_float: Patterns of names of modules that stay in floating point in ``'int8'``.

    Raises:
        UserError: another word, an engine that does not compute in this precision, or one whose packages or GPU are
            not here, or a folder to calibrate on that holds no images.
    """

    fuse: str = 'all'
    precision: str = 'fp32'
    channels_last: bool = True
    engine: str = 'torch'
    calibrate: str | None = None
    keep_float: list[str] | None = None

    def __post_init__(self) -> None:
        for name, known in (('fuse', FUSE), ('precision', PRECISIONS), ('engine', ENGINES)):
            word = getattr(self, name)
            if word not in known:
                raise UserError(f'{name} is {word!r}; expected one of {", ".join(known)}.')
        if self.in_torch and self.precision == 'int8':
            raise UserError('PyTorch does not compute in 8 bits here. Use --engine openvino.')
        if self.engine == 'cudagraph' and not torch.cuda.is_available():
            raise UserError(
                'The engine cudagraph runs on an NVIDIA GPU, and PyTorch finds none here.\n  Use --engine torch.'
            )
        if not self.in_torch:
            from .network import check_engine

            check_engine(self.engine, self.precision)
        if self.precision == 'int8' and self.calibrate is None:
            raise UserError('int8 needs a folder with some hundred images like those to come: --calibrate FOLDER')
        if self.precision != 'int8' and (self.calibrate is not None or self.keep_float):
            raise UserError(f'--calibrate and --keep-float are for --precision int8; found {self.precision}.')
        if self.calibrate is not None:
            from .calibration import images_in

            images_in(Path(self.calibrate))

    @property
    def whole(self) -> bool:
        """Whether the network is one piece, whose parts cannot be told apart."""
        return self.engine != 'torch'

    @property
    def in_torch(self) -> bool:
        """Whether PyTorch runs it, compiled or recorded or neither."""
        return self.engine in ('torch', 'compile', 'cudagraph')

    def __str__(self) -> str:
        layout = ['channels last' if self.channels_last else 'contiguous'] if self.in_torch else []
        return ', '.join([self.precision, f'folded: {self.fuse}', *layout, *([self.engine] if self.whole else [])])


DEFAULT = Deployment()


def deploy(model: Deployable, deployment: Deployment = DEFAULT) -> None:
    """Bring a model into a form to be run in, in place.

    Raises:
        UserError: an engine for the processor, and the model is on an accelerator, or the other way round.
    """
    vars(model).pop('forward_logits', None)
    model.eval()
    model.switch_to_deploy(deployment.fuse)
    device = next(model.parameters()).device
    if device.type != 'cpu' and not deployment.in_torch:
        raise UserError(
            f'The engine {deployment.engine} runs on the processor, and the network is on {device}.\n'
            '  Use --device cpu, or --engine torch.'
        )
    if device.type != 'cuda' and deployment.engine == 'cudagraph':
        raise UserError(
            f'The engine cudagraph runs on an NVIDIA GPU, and the network is on {device}.\n  Use --engine torch.'
        )
    if deployment.in_torch:
        if deployment.precision != 'fp32' and lacks_half_precision(device):
            logger.warning('%s Use --precision fp32.', SLOW_IN_16_BITS)
        pair_downsampling(model)
        model.to_dtype_and_layout(DTYPES[deployment.precision], deployment.channels_last)
    if deployment.engine == 'compile' and device.type != 'cpu':
        model.forward_logits = torch.compile(model.forward_logits)
    elif deployment.engine == 'cudagraph':
        from .cuda_graph import GraphedNetwork

        model.forward_logits = GraphedNetwork(model.forward_logits)
    elif deployment.engine != 'torch':
        from .network import ConvertedNetwork

        calibration = None
        if deployment.precision == 'int8':
            from .calibration import calibrate

            calibration = calibrate(model, deployment.calibrate, deployment.keep_float or ())
        model.forward_logits = ConvertedNetwork(Logits(model), deployment.engine, deployment.precision, calibration)


class Logits(nn.Module):
    """The network of a model as a module: images (N, 3, H, W) to logits. What the model gets later is not in it."""

    def __init__(self, model: Deployable) -> None:
        super().__init__()
        self.model = copy.copy(model)
        self.input_format = str(model._input_kwargs)  # part of what it is made of: see .runtimes.identity

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_logits(images)
