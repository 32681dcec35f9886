"""Networks as training would leave them, and what watches them at work."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def randomise_norms(module: torch.nn.Module, seed: int = 0) -> None:
    """Give batch norms statistics and weights as training would leave them, away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (norm.running_mean, -0.2, 0.2),
                (norm.running_var, 0.5, 1.5),
                (norm.weight.data, 0.5, 1.5),
                (norm.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=generator)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """PyTorch's operations on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Largest(TorchDispatchMode):
    """Remembers the most elements that a tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out
