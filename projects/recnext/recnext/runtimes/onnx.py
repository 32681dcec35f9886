"""ONNX, and ONNX Runtime as an engine."""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.export import ExportedProgram

from .calibration import Calibration
from .engine import Network

if TYPE_CHECKING:
    from onnx import NodeProto
    from torch.onnx import ONNXProgram

FILE = 'network.onnx'

SCOPES = 'pkg.torch.onnx.name_scopes'
"""Where a node says of which module it was made: the names of all that it is in, as Python writes a list."""


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


def module_of(node: 'NodeProto') -> str:
    """The name of the module that a node was made of; empty for one that the exporter made up."""
    for entry in node.metadata_props:
        if entry.key == SCOPES:
            return ast.literal_eval(entry.value)[-2]  # the last is the operation
    return ''


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
    extra = 'onnx'

    def packages_for(self, precision: str) -> tuple[str, ...]:
        """The same for each."""
        return 'onnxruntime', 'onnx', 'onnxscript'

    def check(self, precision: str) -> None:
        """It runs wherever its package does."""

    def convert(self, program: ExportedProgram, folder: Path, calibration: Calibration | None = None) -> None:
        write_network(program, folder)

    def open(self, folder: Path, precision: str) -> Network:
        session = open_session(folder / FILE)
        return lambda images: torch.from_numpy(session(images.contiguous().numpy())['logits'])
