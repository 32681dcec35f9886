"""LiteRT, which was TensorFlow Lite: files for Android; its own interpreter also runs them here to verify them."""

import contextlib
import importlib.util
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..runtimes.calibration import Calibration
from ..runtimes.capture import modules_of
from ..utils.errors import UserError
from .backend import ExportOptions, OfOneSize, SavedModel
from .capture import ArgmaxOverLast, Wrapper
from .latency import compare_latency
from .sizes import ImageSizes
from .source import Source
from .verification import Model

STORED = dict(
    fp32='fp32',
    fp16='weights fp16, computed in fp32',
    int8='int8 where LiteRT has it, weights a scale a channel',
)

METADATA = 'metadata.json'
"""What a file says of itself, in the zip archive at its end, where TensorFlow Lite's own tools put labels as well."""

IMAGE = 'image'
"""What the input is called."""


class ChannelsLast(nn.Module):
    """A wrapper that takes an image as LiteRT and Android have it, with the channels last. Outputs stay as they are."""

    def __init__(self, wrapper: Wrapper) -> None:
        super().__init__()
        self.wrapped = wrapper

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """From an image (1, H, W, 3) to outputs by name."""
        with ArgmaxOverLast():
            return dict(zip(self.wrapped.names, self.wrapped(image.permute(0, 3, 1, 2))))


class LitertModel(NamedTuple):
    """A model in memory, and what it says of itself."""

    content: bytes
    metadata: dict

    def save(self, path: str) -> None:
        Path(path).write_bytes(self.content)
        with zipfile.ZipFile(path, 'a') as archive:
            # Of no date: the same model is the same file.
            archive.writestr(zipfile.ZipInfo(METADATA), json.dumps(self.metadata, ensure_ascii=False))


@dataclass(frozen=True)
class LitertBackend(OfOneSize):
    """One ``.tflite`` file for single images of one size, channels last.

    Args:
        precision: ``'fp32'``; ``'fp16'``, of the weights alone; or ``'int8'``, calibrated.
    """

    precision: str = 'fp32'

    suffix = '.tflite'

    @property
    def stored(self) -> str:
        return STORED[self.precision]

    def check(self, options: ExportOptions) -> None:
        if importlib.util.find_spec('litert_torch') is None:
            raise UserError('LiteRT is not installed: pip install "litert-torch>=0.10.0"')
        super().check(options)

    def convert(
        self, wrapper: Wrapper, sizes: ImageSizes, source: Source, calibration: Calibration | None = None
    ) -> LitertModel:
        import litert_torch

        size = sizes.sizes[0]
        # It would print its steps where the table goes.
        litert_torch.config.show_progress = False
        with torch.no_grad(), _named_by_module():
            image = torch.zeros(1, *size, 3)
            content = litert_torch.convert(ChannelsLast(wrapper).eval(), sample_kwargs={IMAGE: image}).model_content()
        if self.precision == 'fp16':
            content = halve_weights(content)
        if calibration is not None:
            content = quantize(content, calibration)
        return LitertModel(content, dict(source.describe(wrapper, size), layout='NHWC'))

    def read(self, path: Path) -> SavedModel:
        return SavedModel(open_model(path), count_operations(path), f'LiteRT {version("ai-edge-litert")}')

    def measure(self, path: Path, saved: SavedModel, wrapper: Wrapper, size: tuple[int, int]) -> str:
        return compare_latency('LiteRT', saved.predict, wrapper, size)

    def next_step(self, path: Path) -> str:
        return 'docs/litert.md shows how an app runs it'


def open_model(path: Path) -> Model:
    """A saved file in LiteRT's interpreter, with as many threads as PyTorch has.

    It takes images (1, 3, H, W) as those of other formats do; the file itself has the channels last.

    Raises:
        UserError: the interpreter does not take the file.
    """
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(str(path), num_threads=torch.get_num_threads())
        run = interpreter.get_signature_runner()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"LiteRT's own interpreter does not take the file: {error}.") from error
    _, height, width, _ = run.get_input_details()[IMAGE]['shape'].tolist()
    size = (1, 3, height, width)

    def predict(image: np.ndarray) -> dict[str, np.ndarray]:
        if image.shape != size:
            raise UserError(f'The file takes images {size}; found {tuple(image.shape)}.')
        try:
            return run(**{IMAGE: np.array(image.transpose(0, 2, 3, 1), np.float32, order='C')})
        except (RuntimeError, ValueError) as error:
            raise UserError(f"LiteRT's own interpreter does not execute the file: {error}.") from error

    return predict


def read_metadata(path: Path) -> dict:
    """What a file says of itself: see :meth:`.Source.describe`."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(METADATA))


def count_operations(path: Path) -> Counter[str]:
    """The operations of a file, by kind."""
    from ai_edge_litert import schema_py_generated as schema

    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    model = schema.Model.GetRootAs(path.read_bytes())
    graph = model.Subgraphs(0)
    codes = (
        model.OperatorCodes(graph.Operators(index).OpcodeIndex()).BuiltinCode()
        for index in range(graph.OperatorsLength())
    )
    return Counter(names[code] for code in codes)


def halve_weights(content: bytes) -> bytes:
    """A model with the weights of its convolutions in 16 bits."""
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.quantizer import Quantizer

    quantizer = Quantizer(content)
    everything = TFLOperationName.ALL_SUPPORTED
    quantizer.add_weight_only_config('.*', everything, num_bits=16, algorithm_key=AlgorithmName.FLOAT_CASTING)
    return bytes(quantizer.quantize(enable_progress_report=False).quantized_model)


def quantize(content: bytes, calibration: Calibration) -> bytes:
    """Weights and maps in 8 bits, weights a scale a channel, maps in the ranges that they have on images.

    Input and outputs stay as they are.

    Args:
        content: A model whose maps are named by the modules that compute them.
        calibration: The images, and the modules that stay in floating point.
    """
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.calibrator import CalibrationMode, Calibrator
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.quantizer import Quantizer
    from ai_edge_quantizer.recipe_manager import RecipeManager
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    recipe = RecipeManager()
    recipe.add_static_config('.*', TFLOperationName.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    for end in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
        recipe.add_quantization_config('.*', end, algorithm_key=AlgorithmName.NO_QUANTIZE)
    kept = [re.escape(scope) for scope in list_scopes(content) if calibration.keeps(module_of(scope))]
    if kept:
        operations = f'^({"|".join(kept)})$'
        recipe.add_quantization_config(
            operations, TFLOperationName.ALL_SUPPORTED, algorithm_key=AlgorithmName.NO_QUANTIZE
        )
    calibrator = Calibrator(
        content,
        num_threads=torch.get_num_threads(),
        mode=CalibrationMode.CALIBRATION_PRESERVE_ALL_TENSORS,
        qsv_update_func=min_max_update,
    )
    for image in calibration:
        # One at a time: it makes a list of all that it is given.
        inputs = {IMAGE: np.ascontiguousarray(image.transpose(0, 2, 3, 1))}
        calibrator.calibrate({None: [inputs]}, recipe)
    quantizer = Quantizer(content, recipe.get_quantization_recipe())
    return bytes(quantizer.quantize(calibrator.get_model_qsvs(), enable_progress_report=False).quantized_model)


def list_scopes(content: bytes) -> Iterator[str]:
    """The operations of a model, by the names that a recipe knows them by."""
    from ai_edge_quantizer.utils.tfl_flatbuffer_utils import get_op_scope, read_model

    graph = read_model(content).subgraphs[0]
    return (get_op_scope(operation, graph.tensors) for operation in graph.operators)


def module_of(scope: str) -> str:
    """The name of the module that an operation was captured in.

    Args:
        scope: What it computes, such as ``'backbone.stem.1;backbone.stem.0.conv;3;'``: of operations that were made one
            all modules are there, and the last is that of the convolution.
    """
    return scope.removesuffix(';').rpartition(';')[0].rpartition(';')[2]


@contextlib.contextmanager
def _named_by_module() -> Iterator[None]:
    """Maps are called after the module that computes them, by its whole name in the network.

    litert-torch puts the classes of all modules around it in a row, with the last part of the name of each: modules of
    two lists, such as the lateral and the other convolutions of FPN, are called the same.
    """
    from litert_torch.backend.debuginfo import _build

    given = _build._get_hierarchy

    def name_of_module(node: torch.fx.Node) -> str:
        names = modules_of(node)
        return f'{names[-1].removeprefix("wrapped.") if names else ""};'

    _build._get_hierarchy = name_of_module
    try:
        yield
    finally:
        _build._get_hierarchy = given
