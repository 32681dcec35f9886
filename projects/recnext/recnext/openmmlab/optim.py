"""Mixed precision in training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class Bfloat16OptimWrapper(OptimWrapper):
    """Forward passes in bfloat16 where autocast finds that safe; weights and updates stay in float32.

    mmengine's AmpOptimWrapper refuses to work on a CPU, its autocast on all but three kinds of device, and its loss
    scale is of no use here: bfloat16 has the range of float32. float16 does not, and the recursion of RecNeXt is known
    to overflow in it.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device
        with super().optim_context(model), torch.autocast(device.type, torch.bfloat16):
            yield


def use_bfloat16(cfg: Config) -> None:
    """Set a config to train in mixed precision; in place."""
    kept = {key: cfg.optim_wrapper[key] for key in cfg.optim_wrapper if key not in ('dtype', 'loss_scale')}
    cfg.optim_wrapper = dict(kept, type='Bfloat16OptimWrapper')
