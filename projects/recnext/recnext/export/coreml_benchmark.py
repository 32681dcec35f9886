"""The latency of a saved Core ML model, by the units of the machine; needs macOS."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..utils.timing import time_calls, trimmed_mean

if TYPE_CHECKING:
    from coremltools.models import MLModel

WARMUP = 10
ROUNDS = 50
TRIMMED = 0.2
"""Share of the measurements that is left out: half of it the fastest, half the slowest."""

UNITS = dict(ALL='all', CPU_AND_GPU='CPU and GPU', CPU_ONLY='CPU only')


def benchmark_coreml(path: Path) -> str:
    """A line for each choice of units: the trimmed mean of the latency in ms; and what runs on the Neural Engine."""
    import coremltools as ct

    lines = []
    for unit, name in UNITS.items():
        model = ct.models.MLModel(str(path), compute_units=getattr(ct.ComputeUnit, unit))
        inputs = _random_inputs(model)
        seconds = time_calls({name: lambda: model.predict(inputs)}, ROUNDS, WARMUP)[name]  # noqa: B023  (called at once)
        lines.append(f'{name}: {1e3 * trimmed_mean(seconds, TRIMMED):.2f} ms')
    share = _neural_engine_share(model)
    lines.append(f'{100 * share:.0f} % of the operations on the Neural Engine' if share is not None else 'no plan')
    system = f'{platform.machine()}, macOS {platform.mac_ver()[0]}, coremltools {ct.__version__}'
    return f'{"; ".join(lines)}; mean of {ROUNDS} without the outer {100 * TRIMMED:.0f} %; {system}'


def _random_inputs(model: 'MLModel') -> dict[str, Image.Image | np.ndarray]:
    (feature,) = model.get_spec().description.input
    generator = np.random.default_rng(0)
    if feature.type.WhichOneof('Type') == 'imageType':
        size = (feature.type.imageType.height, feature.type.imageType.width, 3)
        return {feature.name: Image.fromarray(generator.integers(0, 256, size, np.uint8))}
    shape = tuple(feature.type.multiArrayType.shape)
    return {feature.name: generator.standard_normal(shape).astype(np.float32)}


def _neural_engine_share(model: 'MLModel') -> float | None:
    """Of the operations of an ML program, those that Core ML prefers to run there; None for other formats."""
    from coremltools.models.compute_device import MLNeuralEngineComputeDevice
    from coremltools.models.compute_plan import MLComputePlan

    plan = MLComputePlan.load_from_path(model.get_compiled_model_path())
    program = plan.model_structure.program
    if program is None:
        return None
    usages = [
        plan.get_compute_device_usage_for_mlprogram_operation(op) for op in program.functions['main'].block.operations
    ]
    devices = [usage.preferred_compute_device for usage in usages if usage is not None]
    return sum(isinstance(device, MLNeuralEngineComputeDevice) for device in devices) / len(devices)
