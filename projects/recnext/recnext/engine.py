"""Additions to MMEngine's training engine."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from mmengine.runner import Runner, autocast
from torch import nn


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


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Keeps the weights in channels-last order in training; convolutions then keep the activations so too."""

    def before_train(self, runner: Runner) -> None:
        """Reorder the weights; their values and shapes stay."""
        runner.model.to(memory_format=torch.channels_last)
