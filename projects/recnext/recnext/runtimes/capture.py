"""Networks captured as graphs by torch.export, the network unchanged: for images of one size, or of any."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

STRIDE = 32
"""The largest stride of the network, in pixels: image sizes are multiples of it."""

LEAST = 3 * STRIDE
"""Sides of the smallest image of a graph that takes any size, in pixels."""


SUBSTITUTES: dict[type[nn.Module], Callable[[nn.Module], nn.Module]] = {}
"""By type, what to capture in the place of modules whose graph would keep the size of one image."""


def any_size() -> dict[int, Dim]:
    """Dimensions of a batch of images (N, 3, H, W) that may change."""
    sides = {dim: STRIDE * Dim(f'blocks_{dim}', min=LEAST // STRIDE, max=1024) for dim in (2, 3)}
    return {0: Dim('batch', min=1, max=4096), **sides}


def capture(
    module: nn.Module, size: tuple[int, int], dynamic: Mapping[int, Dim] | None = None, batch: int = 1
) -> ExportedProgram:
    """The graph of a module for images (N, 3, H, W) by torch.export.

    Args:
        module: Its network is in eval mode.
        size: (H, W) of the images.
        dynamic: Dimensions of the images that may change, by index.
        batch: N, where it is not dynamic.
    """
    dynamic = dict(dynamic or {})
    # A dimension that is 1 when a graph is captured is 1 for good.
    images = torch.zeros(2 if 0 in dynamic else batch, 3, *size)
    if dynamic:
        module = _substitute(module)
    with torch.no_grad():
        return torch.export.export(module.eval(), (images,), dynamic_shapes=(dynamic,) if dynamic else None)


def modules_of(node: Node) -> list[str]:
    """The names of the modules that an operation of a graph was captured in, from the outermost."""
    return [name for name, _ in node.meta.get('nn_module_stack', {}).values() if name]


def _substitute(module: nn.Module) -> nn.Module:
    """Return a copy in which the types in :data:`SUBSTITUTES` are replaced."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) in SUBSTITUTES:
                setattr(parent, name, SUBSTITUTES[type(child)](child))
    return module
