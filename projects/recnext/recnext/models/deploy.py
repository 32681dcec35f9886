"""The form in which a trained network runs fastest: folded, converted, reordered, compiled."""

from dataclasses import dataclass

import torch
from torch import nn

from ..utils.errors import UserError
from .deployable_model import FUSE, DeployableModel
from .folding import DepthwisePair
from .recnext import Downsample

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
"""Floating-point types by the names that the tools use."""


@dataclass(frozen=True)
class Deployment:
    """A form to run a trained network in. The default is the fastest that gives mmseg's label maps.

    Args:
        fuse: What to fold: ``'none'``, ``'norms'`` or ``'all'``; see :meth:`DeployableModel.switch_to_deploy`.
        precision: Of weights and activations, one of :data:`DTYPES`.
        channels_last: Keep weights and activations in channels-last order.
        compile: Compile the network with torch.compile. It takes a minute or more when the first images come.

    Raises:
        UserError: another word for ``fuse`` or ``precision``.
    """

    fuse: str = 'all'
    precision: str = 'fp32'
    channels_last: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        for name, known in (('fuse', FUSE), ('precision', tuple(DTYPES))):
            word = getattr(self, name)
            if word not in known:
                raise UserError(f'{name} is {word!r}; expected one of {", ".join(known)}.')

    def __str__(self) -> str:
        layout = 'channels last' if self.channels_last else 'contiguous'
        return f'{self.precision}, folded: {self.fuse}, {layout}{", compiled" if self.compile else ""}'


DEFAULT = Deployment()


def deploy(model: DeployableModel, deployment: Deployment = DEFAULT) -> None:
    """Bring a model into a form to be run in, in place."""
    model.eval()
    model.switch_to_deploy(deployment.fuse)
    pair_downsampling(model)
    model.set_format(DTYPES[deployment.precision], deployment.channels_last)
    if deployment.compile:
        model.network = torch.compile(model.network)


def pair_downsampling(network: nn.Module) -> None:
    """Make a :class:`DepthwisePair` of every folded downsampling convolution on a CPU; in place, and idempotent."""
    for module in network.modules():
        if isinstance(module, Downsample) and isinstance(module.norm, nn.Identity):
            conv = module.token_mixer
            if isinstance(conv, nn.Conv2d) and conv.weight.device.type == 'cpu':
                module.token_mixer = DepthwisePair(conv)
