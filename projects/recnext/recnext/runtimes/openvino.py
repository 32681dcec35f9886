"""OpenVINO as an engine; it reads ONNX.

Not through its own converter for PyTorch: that reports to its maker over the network, and is no faster in the end.
What makes 8 bits of a network, NNCF, would report as well, and is told not to.
"""

import contextlib
import logging
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch.export import ExportedProgram

from ..utils.errors import UserError
from ..utils.signals import kept_signal_stack
from .calibration import Calibration
from .engine import Network
from .onnx import FILE, module_of, write_network

HINTS = dict(fp32='f32', bf16='bf16', int8='f32')
"""Precisions by OpenVINO's words. Weights stay in single precision on disk; it rounds what it sees fit to. In
8 bits they are rounded, and what is left in floating point is in single precision."""

ROUNDED = 'network.xml'
"""The file of a network in 8 bits; another with its weights lies beside it."""


@dataclass(frozen=True)
class OpenVinoEngine:
    """OpenVINO on the processor, each image as soon as possible."""

    precisions = tuple(HINTS)
    extra = 'openvino'

    def packages_for(self, precision: str) -> tuple[str, ...]:
        """NNCF for 8 bits alone."""
        return 'openvino', 'onnx', 'onnxscript', *(['nncf'] if precision == 'int8' else [])

    def check(self, precision: str) -> None:
        import openvino

        if precision == 'bf16' and 'BF16' not in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
            raise UserError(
                'OpenVINO computes in bfloat16 only on processors with instructions for it, and this one has none. '
                'Use --precision fp32.'
            )

    def convert(self, program: ExportedProgram, folder: Path, calibration: Calibration | None = None) -> None:
        write_network(program, folder)
        if calibration is not None:
            _quantize(folder, calibration)

    @kept_signal_stack()
    def open(self, folder: Path, precision: str) -> Network:
        import openvino

        core = openvino.Core()
        settings = dict(
            PERFORMANCE_HINT='LATENCY',
            INFERENCE_PRECISION_HINT=HINTS[precision],
            INFERENCE_NUM_THREADS=torch.get_num_threads(),
        )
        model = core.read_model(folder / (ROUNDED if precision == 'int8' else FILE))
        request = core.compile_model(model, 'CPU', settings).create_infer_request()

        def run(images: torch.Tensor) -> torch.Tensor:
            # What it gives is a copy, which the next call leaves alone.
            return torch.from_numpy(request.infer([images.contiguous().numpy()], share_inputs=True)[0])

        return run


@kept_signal_stack()
def _quantize(folder: Path, calibration: Calibration) -> None:
    """Put a network in 8 bits in the place of the written one.

    Convolutions and matrix products, weights a channel each, maps by the ranges that they have on images, and biases
    moved by the mean of what rounding does.
    """
    import onnx
    import openvino

    written = folder / FILE
    kept = [node.name for node in onnx.load(written).graph.node if calibration.keeps(module_of(node))]
    # OpenVINO makes several operations of a node, such as a convolution without its biases, and names them after it.
    patterns = [f'^{re.escape(name)}(/.*)?$' for name in kept]
    with _quiet_nncf() as nncf:
        # Weights then keep to half their range; NNCF alone would have it so in the first layer only.
        overflow_fix = nncf.OverflowFix.ENABLE if _sums_overflow() else None
        rounded = nncf.quantize(
            openvino.Core().read_model(written),
            nncf.Dataset(list(calibration.images), calibration.load),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
            ignored_scope=nncf.IgnoredScope(patterns=patterns, validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow_fix),
        )
    openvino.save_model(rounded, folder / ROUNDED, compress_to_fp16=False)
    written.unlink()


def _sums_overflow() -> bool:
    """Whether this processor adds two products of 8 bits in 16, which overflow without a word: x86 without VNNI."""
    has_vnni = getattr(torch.cpu, '_is_vnni_supported', bool)
    return platform.machine().lower() in ('x86_64', 'amd64') and not has_vnni()


@contextlib.contextmanager
def _quiet_nncf() -> Iterator[ModuleType]:
    """NNCF, which shall report nothing to its maker and log no more than errors."""
    os.environ.setdefault('NNCF_DEV', '1')  # its own word for machines that must not report
    import nncf

    logger = logging.getLogger('nncf')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield nncf
    finally:
        logger.setLevel(level)
