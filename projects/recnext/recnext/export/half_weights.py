"""An ONNX file of half the size: weights stored in 16 bits, computed with in 32."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

LEAST = 1024
"""Numbers of a tensor that is worth it; biases and the like stay as they are."""

LARGEST = float(np.finfo(np.float16).max)


def halve_weights(model: 'onnx.ModelProto') -> None:
    """Store the large weights of a graph as float16, each with a Cast to float32, which a runtime carries out at load.

    A tensor with a number that float16 cannot hold stays as it is.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < LEAST or not np.abs(values).max() <= LARGEST:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f'{name}_half'))
        casts.append(helper.make_node('Cast', [tensor.name], [name], f'{name}_single', to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
