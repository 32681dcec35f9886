"""Additions to MMEngine's engine for training and testing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.runner import Runner, autocast
from torch import nn

from .allocation import keep_freed_memory
from .backbone import pair_downsampling
from .errors import UserError
from .segmentor import FUSE, FastEncoderDecoder


@OPTIM_WRAPPERS.register_module()
class Bfloat16OptimWrapper(OptimWrapper):
    """Forward passes in bfloat16 where autocast finds that safe; weights and updates stay in float32.

    mmengine's AmpOptimWrapper refuses to work on a CPU, and its loss scale is of no use here: bfloat16 has the range
    of float32. float16 does not, and the recursion of RecNeXt is known to overflow in it.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield


def use_bfloat16(cfg: Config) -> None:
    """Set a config to train in mixed precision; in place."""
    cfg.optim_wrapper = dict(type='Bfloat16OptimWrapper', optimizer=cfg.optim_wrapper.optimizer)


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Adds images per second, of all processes together, to what is logged of training."""

    # After IterTimerHook, which measures, and before LoggerHook, which prints.
    priority = 'NORMAL'

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Log the images of one iteration over its seconds."""
        seconds = runner.message_hub.get_scalar('train/time').current()
        images = len(data_batch['inputs']) * runner.world_size
        runner.message_hub.update_scalar('train/images_per_second', images / seconds)


DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
"""Floating-point types by the names that the tools use."""


def deploy(
    segmentor: FastEncoderDecoder,
    fuse: str = 'all',
    precision: str = 'fp32',
    channels_last: bool = True,
    compile: bool = False,
) -> None:
    """Bring a segmentor into the form in which it is fastest, in place; the arguments are those of DeployHook."""
    keep_freed_memory()
    segmentor.eval()
    segmentor.switch_to_deploy(fuse)
    pair_downsampling(segmentor)
    segmentor.set_format(DTYPES[precision], channels_last)
    if compile:
        segmentor.network = torch.compile(segmentor.network)


@HOOKS.register_module()
class DeployHook(Hook):
    """Brings the segmentor into the form in which it is fastest before testing; a FastEncoderDecoder.

    Args:
        fuse: See :meth:`segmentor.FastEncoderDecoder.switch_to_deploy`.
        precision: Name of the dtype of weights and activations, one of :data:`DTYPES`.
        channels_last: Keep weights and activations in channels-last order.
        compile: Compile the network with torch.compile. It takes a minute or more when the first images come.

    Raises:
        UserError: another word for ``fuse`` or ``precision``.
    """

    def __init__(
        self, fuse: str = 'all', precision: str = 'fp32', channels_last: bool = True, compile: bool = False
    ) -> None:
        for word, known in ((fuse, FUSE), (precision, DTYPES)):
            if word not in known:
                raise UserError(f'DeployHook: found {word!r}; expected one of {", ".join(known)}.')
        self.fuse = fuse
        self.precision = precision
        self.channels_last = channels_last
        self.compile = compile

    def before_test(self, runner: Runner) -> None:
        """Fold, convert and compile the network that was loaded."""
        segmentor = runner.model
        while hasattr(segmentor, 'module'):  # inside wrappers: distributed, test-time augmentation
            segmentor = segmentor.module
        if not isinstance(segmentor, FastEncoderDecoder):
            raise UserError(f'DeployHook needs model.type FastEncoderDecoder; found {type(segmentor).__name__}.')
        deploy(segmentor, self.fuse, self.precision, self.channels_last, self.compile)
        runner.logger.info(
            f'Network: {self.precision}, folded: {self.fuse}, '
            f'{"channels last" if self.channels_last else "contiguous"}{", compiled" if self.compile else ""}.'
        )


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Keeps the weights in channels-last order in training; convolutions then keep the activations so too."""

    def before_train(self, runner: Runner) -> None:
        """Reorder the weights; their values and shapes stay."""
        runner.model.to(memory_format=torch.channels_last)


@HOOKS.register_module()
class CompileHook(Hook):
    """Compiles the network for training with torch.compile: not mmengine's whole training step, only what computes.

    The names of the weights stay, so checkpoints are the same. The first iterations take minutes.
    """

    def before_train(self, runner: Runner) -> None:
        """Compile backbone, neck and head, each on its own."""
        segmentor = runner.model.module if is_model_wrapper(runner.model) else runner.model
        compile_for_training(segmentor)


def compile_for_training(segmentor: FastEncoderDecoder, **options: str) -> None:
    """Compile the parts of a segmentor, in place, with options of torch.compile."""
    for name, part in segmentor.parts().items():
        if name != 'head':
            part.compile(**options)
    # Heads call their own forward method, past the compiled call.
    segmentor.decode_head.forward = torch.compile(segmentor.decode_head.forward, **options)
