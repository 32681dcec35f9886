"""ONNX, and ONNX Runtime as an engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.export import ExportedProgram

from .engine import Network

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

FILE = 'network.onnx'


def to_onnx(program: ExportedProgram, outputs: Sequence[str]) -> 'ONNXProgram':
    """A captured graph as ONNX, with one input, ``image``; it says nothing of where it was made."""
    converted = torch.onnx.export(
        program, dynamo=True, input_names=['image'], output_names=list(outputs), verbose=False
    )
    # Each node says by lines of which files it was made, and so where these are on this machine.
    for node in converted.model.graph.all_nodes():
        node.metadata_props.pop('pkg.torch.onnx.stack_trace', None)
    converted.model.metadata_props.clear()
    return converted


def open_session(path: Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A saved model in onnxruntime on the processor, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return lambda image: dict(zip(names, session.run(names, dict(image=image))))


def write_network(program: ExportedProgram, folder: Path) -> None:
    """Write a captured network, from images to logits, as the one file in a folder."""
    to_onnx(program, ['logits']).save(folder / FILE)


@dataclass(frozen=True)
class OnnxRuntimeEngine:
    """ONNX Runtime on the processor."""

    precisions = ('fp32',)
    packages = ('onnxruntime', 'onnx', 'onnxscript')
    extra = 'onnx'

    def check(self, precision: str) -> None:
        """It runs wherever its package does."""

    def convert(self, program: ExportedProgram, folder: Path) -> None:
        write_network(program, folder)

    def open(self, folder: Path, precision: str) -> Network:
        session = open_session(folder / FILE)
        return lambda images: torch.from_numpy(session(images.contiguous().numpy())['logits'])
