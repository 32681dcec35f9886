"""Gradients clipped relative to the weights that they belong to."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


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
