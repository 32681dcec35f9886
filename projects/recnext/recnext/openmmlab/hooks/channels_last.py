"""Training with weights and activations in channels-last order."""

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Keeps the weights in channels-last order in training; convolutions then keep the activations so too."""

    def before_train(self, runner: Runner) -> None:
        """Reorder the weights; their values and shapes stay."""
        runner.model.to(memory_format=torch.channels_last)
