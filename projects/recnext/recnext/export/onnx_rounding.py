"""ONNX files with rounded numbers: weights in 16 bits, or weights and maps in 8."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..runtimes.calibration import Calibration
from ..runtimes.onnx import module_of

if TYPE_CHECKING:
    from onnx import ModelProto

OPERATIONS = ('Conv', 'MatMul')
"""What is computed in 8 bits; everything else is faster, and more exact, as it is."""


def halve_weights(model: 'ModelProto') -> None:
    """Store the weights in 16 bits, and have them cast when the file is opened; in place.

    The operations stay in single precision: runtimes have those for every machine, and a cast of a constant costs
    nothing once the file is open.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph, casts = model.graph, []
    for tensor in graph.initializer:
        # Kernels: what is smaller would not make the file smaller either.
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            name = tensor.name
            with np.errstate(over='ignore'):  # verifying finds what became infinite
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16)))
            tensor.name = f'{name}_half'
            casts.append(helper.make_node('Cast', [tensor.name], [name], f'{name}_cast', to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def quantize(model: 'ModelProto', calibration: Calibration) -> 'ModelProto':
    """Convolutions and matrix products in 8 bits: weights a channel each, maps by the ranges that they have on images.

    In the form that every runtime reads, QDQ: operations in single precision between pairs that round what goes in.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs = iter(calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.inputs, None)
            return None if image is None else dict(image=image)

    kept = [node.name for node in model.graph.node if calibration.keeps(module_of(node))]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        before, after = Path(folder, 'before.onnx'), Path(folder, 'after.onnx')
        onnx.save(model, before)
        quantize_static(
            before,
            after,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(OPERATIONS),
            nodes_to_exclude=kept,
            per_channel=True,
            # Processors without VNNI add products of uint8 with int8 in 16 bits, which overflow; of uint8 they do not.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QUInt8,
            extra_options=dict(WeightSymmetric=True),
        )
        quantized = onnx.load(after)
    del quantized.metadata_props[:]  # it says what made it; what the model said of itself is there below
    quantized.metadata_props.extend(model.metadata_props)
    return quantized


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """It asks on the root logger for a preparation that the exporter did already."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)
