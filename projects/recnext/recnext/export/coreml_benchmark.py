"""The latency of a saved Core ML model, by the units of the machine; needs macOS."""

import platform
import time
from pathlib import Path

import numpy as np

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
        lines.append(f'{name}: {1e3 * _measure(lambda: model.predict(inputs)):.2f} ms')  # noqa: B023  (called at once)
    share = _neural_engine_share(model)
    lines.append(f'{100 * share:.0f} % of the operations on the Neural Engine' if share is not None else 'no plan')
    system = f'{platform.machine()}, macOS {platform.mac_ver()[0]}, coremltools {ct.__version__}'
    return f'{"; ".join(lines)}; mean of {ROUNDS} without the outer {100 * TRIMMED:.0f} %; {system}'


def _measure(call: object) -> float:
    """Seconds of a call."""
    for _ in range(WARMUP):
        call()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return trimmed_mean(seconds, TRIMMED)


def trimmed_mean(values: list[float], share: float) -> float:
    """The mean without the ``share`` of the values that lies outermost, half of it on each side."""
    cut = int(len(values) * share / 2)
    return float(np.mean(sorted(values)[cut : len(values) - cut]))


def _random_inputs(model: object) -> dict:
    from PIL import Image

    (feature,) = model.get_spec().description.input
    generator = np.random.default_rng(0)
    if feature.type.WhichOneof('Type') == 'imageType':
        size = (feature.type.imageType.height, feature.type.imageType.width, 3)
        return {feature.name: Image.fromarray(generator.integers(0, 256, size, np.uint8))}
    shape = tuple(feature.type.multiArrayType.shape)
    return {feature.name: generator.standard_normal(shape).astype(np.float32)}


def _neural_engine_share(model: object) -> float | None:
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
