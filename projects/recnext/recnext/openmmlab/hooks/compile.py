"""Training with a compiled network."""

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..deployable import DeployableModel


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
