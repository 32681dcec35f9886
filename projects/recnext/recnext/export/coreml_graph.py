"""A captured graph with sizes that vary, rewritten into what coremltools knows."""

import operator

import torch
from torch.export import ExportedProgram


def fix_scales(program: ExportedProgram) -> None:
    """Say by which factor each resize enlarges its map, in place of the size that it makes; in place.

    coremltools cannot tell the factor where sizes are not known, though the sizes are multiples of each other.
    """
    for node in program.graph.nodes:
        resize = {
            torch.ops.aten.upsample_bilinear2d.vec: lambda x, size, align, *_: (x, None, align),
            torch.ops.aten.upsample_nearest2d.vec: lambda x, size, *_: (x, None),
        }.get(node.target)
        if resize:
            before, after = (one.meta['val'].shape[2:] for one in (node.args[0], node))
            # Of the sizes that the graph was captured with.
            factors = [int(new) / int(old) for new, old in zip(map(_hint, after), map(_hint, before))]
            node.args = (*resize(*node.args), factors)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _hint(length: int | torch.SymInt) -> int:
    return length.node.hint if isinstance(length, torch.SymInt) else length


def replace_powers(program: ExportedProgram) -> None:
    """Compute powers of sizes (RecAttn's scale) with tensors: coremltools knows no floating-point sizes; in place."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is operator.pow and node.args[0].target is torch.sym_float:
            size, exponent = node.args[0].args[0], node.args[1]
            with graph.inserting_before(node):
                one = graph.call_function(torch.ops.aten.full.default, ([1], 1.0))
                length = graph.call_function(torch.ops.aten.mul.Tensor, (one, size))
                power = graph.call_function(torch.ops.aten.pow.Tensor_Scalar, (length, exponent))
            node.replace_all_uses_with(power)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
