"""Core ML: files that an app takes, verified by Core ML itself on macOS and by executing them here elsewhere."""

import contextlib
import importlib.util
import io
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch.export import Dim, ExportedProgram

from ..openmmlab.config import named_classes
from ..runtimes.calibration import Calibration
from ..runtimes.capture import STRIDE, capture
from ..utils.errors import UserError
from .backend import ExportOptions, OfPrecision, SavedModel
from .capture import ExportedBackbone, ExportedSegmentor, Wrapper
from .coreml_benchmark import benchmark_coreml
from .coreml_evaluator import CoreMLEvaluator
from .coreml_graph import fix_scales, replace_powers
from .coreml_network import NetworkEvaluator
from .coreml_program import ProgramEvaluator
from .coreml_rounding import compress_weights, quantize
from .sizes import ImageSizes, check_sizes
from .source import Source
from .verification import Model

if TYPE_CHECKING:
    from coremltools.models import MLModel

SUFFIXES = dict(mlprogram='.mlpackage', neuralnetwork='.mlmodel')

TARGETS = dict(mlprogram=('iOS16', 'iOS15', 'iOS17', 'iOS18'), neuralnetwork=('iOS14', 'iOS13'))
"""The oldest systems that a format can be made for; the first is the default."""


@dataclass(frozen=True)
class CoreMLBackend(OfPrecision):
    """One ``.mlpackage`` or ``.mlmodel``: single images of one size or of several.

    Args:
        format: ``'mlprogram'`` or ``'neuralnetwork'``.
        precision: ``'fp16'`` or ``'fp32'``, in a neural network of the weights alone; or ``'int8'``, calibrated.
        target: Oldest system that it must run on, one of :data:`TARGETS`; if None, the first of the format.
        compress: Weights as indices into 64 values a tensor (``'palettize'``), or as 8-bit integers (``'linear8'``).
    """

    format: str = 'mlprogram'
    precision: str = 'fp16'
    target: str | None = None
    compress: str = 'none'

    single = True

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.format]

    @property
    def oldest(self) -> str:
        """The oldest system that the file is for."""
        return self.target or ('iOS17' if self.calibrated else TARGETS[self.format][0])

    @property
    def compressed(self) -> bool:
        """Whether the weights are rounded further than their precision says."""
        return self.compress != 'none'

    @property
    def tolerance(self) -> str:
        return 'compressed' if self.compressed else self.precision

    @property
    def stored(self) -> str:
        if self.calibrated:
            return 'int8 (W8A8), weights a scale a channel; the rest fp16'
        return self.precision + (f', weights {self.compress}' if self.compressed else '')

    def check(self, options: ExportOptions) -> None:
        format, target, compress = self.format, self.oldest, self.compress
        if target not in TARGETS[format]:
            known = ', '.join(sorted(TARGETS[format]))
            raise UserError(f'--format {format} exists for {known}; found --target {target}.')
        if self.compressed and (format != 'mlprogram' or target == 'iOS15'):
            raise UserError(f'--compress {compress} needs --format mlprogram and at least iOS16.')
        if self.calibrated and (format != 'mlprogram' or target not in ('iOS17', 'iOS18') or self.compressed):
            raise UserError(
                '--precision int8 needs --format mlprogram and at least iOS17, and has no --compress: it rounds both.'
            )
        if self.compressed and self.precision == 'fp32':
            raise UserError(f'--compress {compress} rounds the weights, for which --precision fp16 is enough.')
        if compress == 'palettize' and importlib.util.find_spec('sklearn') is None:
            raise UserError('--compress palettize needs the package scikit-learn: pip install scikit-learn')
        if options.benchmark and sys.platform != 'darwin':
            raise UserError('--benchmark measures with Core ML itself, and needs macOS.')
        if self.calibrated and options.size and len(options.size) > 1:
            raise UserError('--precision int8 is for one size: ranges are measured on images of it.')

    def choose_sizes(self, asked: Sequence[tuple[int, int]], source: Source) -> ImageSizes:
        sizes = asked or [source.crop_size]
        check_sizes(sizes)
        if self.format == 'neuralnetwork' and (len(sizes) > 1 or any(side % (2 * STRIDE) for side in sizes[0])):
            raise UserError(
                'A neural network resizes by whole numbers, and has one size, of multiples of '
                f'{2 * STRIDE}. --format mlprogram takes others.'
            )
        return ImageSizes(sizes)

    def convert(
        self, wrapper: Wrapper, sizes: ImageSizes, source: Source, calibration: Calibration | None = None
    ) -> 'MLModel':
        _quiet_coremltools()
        import coremltools as ct

        program = capture_for_coreml(wrapper, sizes)
        shapes = [(1, 3, *size) for size in sizes.sizes]
        shape = shapes[0] if len(shapes) == 1 else ct.EnumeratedShapes(shapes, default=shapes[0])
        if isinstance(wrapper, ExportedSegmentor):
            inputs = [ct.ImageType('image', shape=shape, color_layout=ct.colorlayout.RGB)]
        else:
            inputs = [ct.TensorType('image', shape=shape, dtype=np.float32)]
        types = {'labels': np.int32}
        outputs = [ct.TensorType(name, dtype=types.get(name, np.float32)) for name in wrapper.names]
        options = dict(minimum_deployment_target=getattr(ct.target, self.oldest))
        if self.format == 'mlprogram':
            options['compute_precision'] = ct.precision.FLOAT32 if self.precision == 'fp32' else ct.precision.FLOAT16
        model = ct.convert(
            program, convert_to=self.format, inputs=inputs, outputs=outputs, skip_model_load=True, **options
        )
        if self.format == 'neuralnetwork' and self.precision == 'fp16':
            model = _halve_weights(model)
        if self.compressed:
            model = compress_weights(model, self.compress)
        if calibration is not None:
            model = quantize(model, program, calibration)
        write_description(model, wrapper, sizes, source)
        return model

    def read(self, path: Path) -> SavedModel:
        saved = open_model(path)
        predict = predict_with_coreml(path) if sys.platform == 'darwin' else saved
        return SavedModel(predict, saved.operations, f'{self.format} for {self.oldest} or later')

    def measure(self, path: Path, saved: SavedModel, wrapper: Wrapper, size: tuple[int, int]) -> str:
        return benchmark_coreml(path)

    def next_step(self, path: Path) -> str:
        return 'drag the file into Xcode; docs/phone.md has the Swift code'


def open_model(path: str | Path) -> CoreMLEvaluator:
    """Read a saved ``.mlpackage`` or ``.mlmodel``, to execute it without Core ML."""
    import coremltools as ct

    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    if spec.WhichOneof('Type') == 'mlProgram':
        return ProgramEvaluator(Path(path), spec, model.weights_dir)
    return NetworkEvaluator(Path(path), spec)


def capture_for_coreml(wrapper: Wrapper, sizes: ImageSizes) -> ExportedProgram:
    """The graph for images of one size, or of sizes that vary, in operations that coremltools knows."""
    first, *others = sizes.sizes
    block, dynamic = 2 * STRIDE, None
    if others:
        dynamic = {dim + 2: block * Dim(f'blocks_{dim}', min=2, max=max(sizes.sizes)[dim]) for dim in range(2)}
    program = capture(wrapper, first, dynamic).run_decompositions({})
    if others:
        fix_scales(program)
        replace_powers(program)
    return program


def write_description(model: 'MLModel', wrapper: Wrapper, sizes: ImageSizes, source: Source) -> None:
    """Write into a model what it is, where it is from, and for a segmentor what Xcode's preview needs."""
    own = source.origin()
    model.author = 'RecNeXt: https://github.com/suous/RecNeXt'
    model.license = 'Apache-2.0'
    model.version = own['sha256'][:12]
    if isinstance(wrapper, ExportedBackbone):
        model.short_description = f'The backbone of {own["config"]}.'
        model.input_description['image'] = 'RGB, normalised as in training, (1, 3, height, width)'
        said = {
            f'feature_{index}': f'Feature map of stride {2 ** (index + 2)}, (1, channels, ...)' for index in range(4)
        }
    else:
        classes, palette = named_classes(source.cfg)
        height, width = sizes.sizes[0]
        several = ' or other sizes' if len(sizes.sizes) > 1 else ''
        model.short_description = f'Semantic segmentation into {len(classes)} classes: {own["config"]}.'
        model.input_description['image'] = f'RGB image, {width} x {height} pixels{several}'
        said = dict(
            labels='Class of every pixel, (height, width): index into the classes in the metadata',
            logits='Scores of the classes at a quarter of the size, (1, classes, height / 4, width / 4)',
        )
        own['classes'] = json.dumps(classes)
        # https://apple.github.io/coremltools/docs-guides/source/xcode-model-preview-types.html
        own['com.apple.coreml.model.preview.type'] = 'imageSegmenter'
        colors = ['#{:02X}{:02X}{:02X}'.format(*color) for color in palette]
        own['com.apple.coreml.model.preview.params'] = json.dumps(dict(labels=classes, colors=colors))
    for output in model.output_description:
        model.output_description[output] = said[output]
    model.user_defined_metadata.update(own)


def predict_with_coreml(path: Path) -> Model:
    """The saved model run by Core ML itself, on the processor; needs macOS."""
    import coremltools as ct

    model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.CPU_ONLY)
    takes_pictures = model.get_spec().description.input[0].type.WhichOneof('Type') == 'imageType'

    def predict(image: np.ndarray) -> dict[str, np.ndarray]:
        if takes_pictures:
            return model.predict(dict(image=Image.fromarray(image[0].transpose(1, 2, 0).astype(np.uint8))))
        return model.predict(dict(image=image))

    return predict


def _halve_weights(model: 'MLModel') -> 'MLModel':
    """A neural network with its weights in 16 bits."""
    import coremltools as ct
    from coremltools.models.neural_network.quantization_utils import quantize_weights

    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for every layer
        halved = quantize_weights(model, nbits=16)
    # Off macOS the specification alone comes back.
    return halved if isinstance(halved, ct.models.MLModel) else ct.models.MLModel(halved, skip_model_load=True)


def _quiet_coremltools() -> None:
    """coremltools warns of every torch newer than its tests and of every missing macOS library; verifying is better."""
    for name in ('coremltools', 'coremltools.converters.mil.mil.types.symbolic'):
        logging.getLogger(name).setLevel(logging.ERROR)
