"""Core ML programs with rounded numbers: weights as one of 64 values or in 8 bits, and maps in 8 bits as well."""

from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np
from torch.export import ExportedProgram

from ..runtimes.calibration import Calibration
from .coreml_program import ProgramEvaluator

if TYPE_CHECKING:
    from coremltools.models import MLModel
    from coremltools.optimize.coreml import OptimizationConfig


def compress_weights(model: 'MLModel', how: str) -> 'MLModel':
    """Weights as one of 64 values of their tensor (``'palettize'``), or 8-bit integers, a scale a channel."""
    import coremltools.optimize.coreml as cto

    if how == 'palettize':
        config = cto.OpPalettizerConfig(mode='kmeans', nbits=6)
        return cto.palettize_weights(model, cto.OptimizationConfig(global_config=config))
    return cto.linear_quantize_weights(model, _linear8())


def quantize(model: 'MLModel', program: ExportedProgram, calibration: Calibration) -> 'MLModel':
    """Convolutions in 8 bits: weights a scale a channel, and maps by the ranges that they have on images.

    Args:
        model: In floating point, for iOS 17 or later.
        program: What it was converted from: says which operation is of which module.
        calibration: The images, and the modules that stay in floating point.
    """
    import coremltools.optimize.coreml as cto
    from coremltools.optimize.coreml import _post_training_quantization as tool

    kept = [name for name in operations_of(model) if calibration.keeps(module_of(name, program))]
    ranges = measure_ranges(model, calibration)
    # The tool measures them with Core ML, which needs macOS, and keeps those of the last image alone.
    with patch.object(tool, '_get_activation_calibration_stats', lambda *_: ranges):
        model = cto.linear_quantize_activations(model, _linear8(*kept), sample_data=[])
    return cto.linear_quantize_weights(model, _linear8(*kept))


def measure_ranges(model: 'MLModel', calibration: Calibration) -> dict[str, dict[str, float]]:
    """The least and the largest value that each map takes on the images, by its name, as the tool has them."""
    evaluate = ProgramEvaluator(Path('calibration'), model.get_spec(), model.weights_dir)
    ranges: dict[str, dict[str, float]] = {}
    for image in calibration:
        evaluate(image)
        for name, value in evaluate.values.items():
            if value.is_floating_point():
                least, largest = value.aminmax()
                known = ranges.setdefault(name, dict(rmin=float(least), rmax=float(largest)))
                known.update(rmin=min(known['rmin'], float(least)), rmax=max(known['rmax'], float(largest)))
    return ranges


def operations_of(model: 'MLModel') -> list[str]:
    """The names of the operations of a program."""
    block = next(iter(model.get_spec().mlProgram.functions['main'].block_specializations.values()))
    return [operation.attributes['name'].immediateValue.tensor.strings.values[0] for operation in block.operations]


def module_of(operation: str, program: ExportedProgram) -> str:
    """The name of the module that an operation was made of; empty for one that coremltools made up."""
    for node in program.graph.nodes:
        if node.name == operation.removesuffix('_cast_fp16') and node.meta.get('nn_module_stack'):
            return list(node.meta['nn_module_stack'].values())[-1][0]
    return ''


def _linear8(*kept: str) -> 'OptimizationConfig':
    """Convolutions in 8 bits without a zero point, but for operations of these names."""
    import coremltools.optimize.coreml as cto

    config = cto.OpLinearQuantizerConfig(mode='linear_symmetric', dtype=np.int8)
    return cto.OptimizationConfig(
        global_config=config, op_type_configs=dict(add=None), op_name_configs=dict.fromkeys(kept)
    )
