"""OpenVINO as an engine; it reads ONNX.

Not through its own converter for PyTorch: that reports to its maker over the network, and is no faster in the end.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ..utils.errors import UserError
from .engine import Network
from .onnx import FILE, write_network

HINTS = dict(fp32='f32', bf16='bf16')
"""Precisions by OpenVINO's words. Weights stay in single precision on disk; it rounds what it sees fit to."""


@dataclass(frozen=True)
class OpenVinoEngine:
    """OpenVINO on the processor, each image as soon as possible."""

    precisions = tuple(HINTS)
    packages = ('openvino', 'onnx', 'onnxscript')
    extra = 'openvino'

    def check(self, precision: str) -> None:
        import openvino

        if precision == 'bf16' and 'BF16' not in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
            raise UserError(
                'OpenVINO computes in bfloat16 only on processors with instructions for it, and this one has none. '
                'Use --precision fp32.'
            )

    def convert(self, program: ExportedProgram, folder: Path) -> None:
        write_network(program, folder)

    def open(self, folder: Path, precision: str) -> Network:
        import openvino

        core = openvino.Core()
        settings = dict(
            PERFORMANCE_HINT='LATENCY',
            INFERENCE_PRECISION_HINT=HINTS[precision],
            INFERENCE_NUM_THREADS=torch.get_num_threads(),
        )
        request = core.compile_model(core.read_model(folder / FILE), 'CPU', settings).create_infer_request()

        def run(images: torch.Tensor) -> torch.Tensor:
            # What it gives is a copy, which the next call leaves alone.
            return torch.from_numpy(request.infer([images.contiguous().numpy()], share_inputs=True)[0])

        return run
