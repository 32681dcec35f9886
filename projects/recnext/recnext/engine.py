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
from .deployable import FUSE, DeployableModel
from .errors import UserError


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
    kept = {key: cfg.optim_wrapper[key] for key in cfg.optim_wrapper if key not in ('dtype', 'loss_scale')}
    cfg.optim_wrapper = dict(kept, type='Bfloat16OptimWrapper')


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
    model: DeployableModel,
    fuse: str = 'all',
    precision: str = 'fp32',
    channels_last: bool = True,
    compile: bool = False,
) -> None:
    """Bring a model into the form in which it is fastest, in place; the arguments are those of DeployHook."""
    keep_freed_memory()
    model.eval()
    model.switch_to_deploy(fuse)
    pair_downsampling(model)
    model.set_format(DTYPES[precision], channels_last)
    if compile:
        model.network = torch.compile(model.network)


@HOOKS.register_module()
class DeployHook(Hook):
    """Brings the model into the form in which it is fastest before testing; a DeployableModel.

    Args:
        fuse: See :meth:`deployable.DeployableModel.switch_to_deploy`.
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
        model = runner.model
        while hasattr(model, 'module'):  # inside wrappers: distributed, test-time augmentation
            model = model.module
        if not isinstance(model, DeployableModel):
            raise UserError(
                f'DeployHook needs model.type FastEncoderDecoder or RecNeXtClassifier; found {type(model).__name__}.'
            )
        deploy(model, self.fuse, self.precision, self.channels_last, self.compile)
        runner.logger.info(
            f'Network: {self.precision}, folded: {self.fuse}, '
            f'{"channels last" if self.channels_last else "contiguous"}{", compiled" if self.compile else ""}.'
        )


@HOOKS.register_module()
class AdaptiveClipHook(Hook):
    """Clips gradients in training relative to the weights that they belong to.

    Brock et al., High-Performance Large-Scale Image Recognition Without Normalization
    (https://arxiv.org/abs/2102.06171), as timm does it. It works with any OptimWrapper that does not scale the loss.

    Args:
        clip_factor: The most that a gradient's norm may be of its weight's.
    """

    def __init__(self, clip_factor: float = 0.01) -> None:
        self.clip_factor = clip_factor

    def before_train(self, runner: Runner) -> None:
        """Clip before every step of the optimizer."""
        from timm.utils.agc import adaptive_clip_grad

        def clip(optimizer: torch.optim.Optimizer, *_: object) -> None:
            for group in optimizer.param_groups:
                adaptive_clip_grad(group['params'], self.clip_factor)

        runner.optim_wrapper.optimizer.register_step_pre_hook(clip)


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
        compile_for_training(runner.model.module if is_model_wrapper(runner.model) else runner.model)


def compile_for_training(model: DeployableModel, **options: str) -> None:
    """Compile the parts of a model, in place, with options of torch.compile."""
    for name, part in model.parts().items():
        if name == 'head':
            # Heads call their own forward method, past the compiled call.
            part.forward = torch.compile(part.forward, **options)
        else:
            part.compile(**options)
