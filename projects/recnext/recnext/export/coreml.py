"""Core ML: one checkpoint to one file that an app takes, checked before it is written."""

import contextlib
import importlib.util
import io
import json
import logging
import operator
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from ..engine.config import named_classes
from ..utils.errors import UserError
from ..utils.files import written_beside
from ..utils.memory import peak_of_process
from .capture import STRIDE, ExportedBackbone, ExportedSegmentor, capture, check_free, check_sizes, format_table
from .coreml_benchmark import benchmark_coreml
from .coreml_evaluator import open_model
from .source import Source, load_source
from .verification import Model, find_images
from .verification import verify as verify_saved

if TYPE_CHECKING:
    from coremltools.models import MLModel


SUFFIXES = dict(mlprogram='.mlpackage', neuralnetwork='.mlmodel')

TARGETS = dict(mlprogram=('iOS16', 'iOS15', 'iOS17', 'iOS18'), neuralnetwork=('iOS14', 'iOS13'))
"""The oldest systems that a format can be made for; the first is the default."""


def export_coreml(
    config: str,
    checkpoint: str,
    out: str,
    part: str = 'segmentor',
    size: Sequence[Sequence[int]] | None = None,
    format: str = 'mlprogram',
    precision: str = 'fp16',
    output: str = 'labels',
    target: str | None = None,
    compress: str = 'none',
    fuse: str = 'all',
    verify: bool = True,
    images: Sequence[str] | None = None,
    benchmark: bool = False,
    cfg_options: dict | None = None,
) -> str:
    """Export a checkpoint; see ``python tools/export_coreml.py --help``.

    Args:
        config: Path of the config.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        out: File to write, ``.mlpackage`` or ``.mlmodel``.
        part: ``'segmentor'``, from pixels to labels, or ``'backbone'``, from a normalised image to features.
        size: Sizes (height, width) of the image, in pixels; that of the config's training crops if None.
        format: ``'mlprogram'`` or ``'neuralnetwork'``.
        precision: ``'fp16'`` or ``'fp32'``; in a neural network of the weights alone.
        output: Of a segmentor: ``'labels'``, ``'logits'`` or ``'both'``.
        target: Oldest system that it must run on, one of :data:`TARGETS`.
        compress: Weights as indices into 64 values a tensor (``'palettize'``), or as 8-bit integers (``'linear8'``).
        fuse: See :meth:`segmentor.FastEncoderDecoder.switch_to_deploy`.
        verify: Compare the saved file with PyTorch.
        images: Image files to verify with.
        benchmark: Measure the latency; on macOS.
        cfg_options: Merged into the config.

    Returns:
        A table of what was made.

    Raises:
        UserError: what does not fit, or a saved model that is wrong; nothing is written.
    """
    began = time.monotonic()
    path = Path(out)
    target = target or TARGETS[format][0]
    _check_words(format, target, precision, compress)
    check_free(path, SUFFIXES[format])
    if benchmark and sys.platform != 'darwin':
        raise UserError('--benchmark measures with Core ML itself, and needs macOS.')
    source = load_source(config, checkpoint, fuse, cfg_options)
    sizes = [tuple(map(int, one)) for one in size or [source.cfg.crop_size]]
    check_sizes(sizes)
    if format == 'neuralnetwork' and (len(sizes) > 1 or any(side % (2 * STRIDE) for side in sizes[0])):
        raise UserError(
            'A neural network resizes by whole numbers, and has one size, of multiples of '
            f'{2 * STRIDE}. --format mlprogram takes others.'
        )
    named, pictures = find_images(source.cfg, images) if verify else ('', [])
    _quiet_coremltools()
    model = convert(source.wrap(part, output, single=True), sizes, format, precision, target)
    if compress != 'none':
        model = compress_weights(model, compress)
    describe(model, source, part, sizes)
    with written_beside(path) as beside:
        model.save(str(beside))
        saved = open_model(beside)
        run = predict_with_coreml(beside, part) if sys.platform == 'darwin' else saved
        agreement = verify_saved(run, source.original, part, sizes, pictures, named) if verify else None
        if agreement:
            agreement.check(precision if compress == 'none' else 'compressed')
        if not saved.multiply_adds:
            saved(np.zeros((1, 3, *sizes[-1]), np.float32))
        rows = dict(
            file=out,
            size=f'{_size(beside) / 1e6:.1f} MB',
            image=', '.join(f'{height} x {width}' for height, width in sizes) + ' pixels (height x width)',
            operations=f'{saved.operations.total()}: '
            + ', '.join(f'{number} {kind}' for kind, number in saved.operations.most_common()),
        )
    rows['multiply-adds'] = f'{saved.multiply_adds / 1e9:.2f} G at {" x ".join(map(str, sizes[-1]))}, folded: {fuse}'
    rows['precision'] = precision + (f', weights {compress}' if compress != 'none' else '')
    rows['format'] = f'{format} for {target} or later, by torch.export'
    rows['verified'] = str(agreement) if agreement else 'no'
    rows['took'] = f'{time.monotonic() - began:.0f} s, at most {(peak_of_process() or 0) / 1e3:.1f} GB of memory'
    if benchmark:
        rows['latency'] = benchmark_coreml(path)
    rows['next'] = 'drag the file into Xcode; docs/phone.md has the Swift code'
    return format_table(rows)


def _check_words(format: str, target: str, precision: str, compress: str) -> None:
    if target not in TARGETS[format]:
        raise UserError(f'--format {format} exists for {", ".join(sorted(TARGETS[format]))}; found --target {target}.')
    if compress != 'none' and (format != 'mlprogram' or target == 'iOS15'):
        raise UserError(f'--compress {compress} needs --format mlprogram and at least iOS16.')
    if compress != 'none' and precision == 'fp32':
        raise UserError(f'--compress {compress} rounds the weights, for which --precision fp16 is enough.')


def _size(path: Path) -> int:
    """Of a file, or of all the files of a package, in bytes."""
    files = [file for file in path.rglob('*') if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def convert(
    wrapper: ExportedSegmentor | ExportedBackbone,
    sizes: Sequence[tuple[int, int]],
    format: str = 'mlprogram',
    precision: str = 'fp16',
    target: str = 'iOS16',
) -> 'MLModel':
    """A Core ML model (``coremltools.models.MLModel``) of a wrapper in eval mode, for images of one size or several."""
    import coremltools as ct

    if len(sizes) == 1:
        program = capture(wrapper, sizes[0])
        shape = (1, 3, *sizes[0])
    else:
        block = 2 * STRIDE
        dynamic = {dim + 2: block * Dim(f'blocks_{dim}', min=2, max=max(sizes)[dim]) for dim in range(2)}
        program = capture(wrapper, sizes[0], dynamic)
        fix_scales(program)
        replace_powers(program)
        shape = ct.EnumeratedShapes([(1, 3, *one) for one in sizes], default=(1, 3, *sizes[0]))
    if isinstance(wrapper, ExportedSegmentor):
        inputs = [ct.ImageType('image', shape=shape, color_layout=ct.colorlayout.RGB)]
    else:
        inputs = [ct.TensorType('image', shape=shape, dtype=np.float32)]
    types = {'labels': np.int32}
    outputs = [ct.TensorType(name, dtype=types.get(name, np.float32)) for name in wrapper.names]
    options = dict(minimum_deployment_target=getattr(ct.target, target))
    if format == 'mlprogram':
        options['compute_precision'] = ct.precision.FLOAT16 if precision == 'fp16' else ct.precision.FLOAT32
    model = ct.convert(program, convert_to=format, inputs=inputs, outputs=outputs, skip_model_load=True, **options)
    if format == 'neuralnetwork' and precision == 'fp16':
        model = _halve_weights(model)
    return model


def fix_scales(program: ExportedProgram) -> None:
    """Say by which factor each resize enlarges its map, in place of the size that it makes; in place.

    coremltools cannot tell the factor where sizes are not known, though the sizes are multiples of each other.
    """
    for node in program.graph.nodes:
        resize = {
            torch.ops.aten.upsample_bilinear2d.vec: lambda x, size, align, *_: (x, None, align),
            torch.ops.aten.upsample_nearest2d.vec: lambda x, size, *_: (x, None),
        }.get(node.target)
        if resize:
            before, after = (one.meta['val'].shape[2:] for one in (node.args[0], node))
            # Of the sizes that the graph was captured with.
            factors = [int(new) / int(old) for new, old in zip(map(_hint, after), map(_hint, before))]
            node.args = (*resize(*node.args), factors)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()


def _hint(length: int | torch.SymInt) -> int:
    return length.node.hint if isinstance(length, torch.SymInt) else length


def replace_powers(program: ExportedProgram) -> None:
    """Compute powers of sizes (RecAttn's scale) with tensors: coremltools knows no floating-point sizes; in place."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is operator.pow and node.args[0].target is torch.sym_float:
            size, exponent = node.args[0].args[0], node.args[1]
            with graph.inserting_before(node):
                one = graph.call_function(torch.ops.aten.full.default, ([1], 1.0))
                length = graph.call_function(torch.ops.aten.mul.Tensor, (one, size))
                power = graph.call_function(torch.ops.aten.pow.Tensor_Scalar, (length, exponent))
            node.replace_all_uses_with(power)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def compress_weights(model: 'MLModel', how: str) -> 'MLModel':
    """Weights as one of 64 values of their tensor (``'palettize'``), or 8-bit integers, a scale a channel."""
    import coremltools.optimize.coreml as cto

    if how == 'palettize':
        if importlib.util.find_spec('sklearn') is None:
            raise UserError('--compress palettize needs the package scikit-learn: pip install scikit-learn')
        config = cto.OpPalettizerConfig(mode='kmeans', nbits=6)
        return cto.palettize_weights(model, cto.OptimizationConfig(global_config=config))
    config = cto.OpLinearQuantizerConfig(mode='linear_symmetric', dtype=np.int8)
    return cto.linear_quantize_weights(model, cto.OptimizationConfig(global_config=config))


def describe(model: 'MLModel', source: Source, part: str, sizes: Sequence[tuple[int, int]]) -> None:
    """Write into a model what it is, where it is from, and for a segmentor what Xcode's preview needs."""
    own = source.describe()
    model.author = 'RecNeXt: https://github.com/suous/RecNeXt'
    model.license = 'Apache-2.0'
    model.version = own['sha256'][:12]
    if part == 'backbone':
        model.short_description = f'The backbone of {own["config"]}.'
        model.input_description['image'] = 'RGB, normalised as in training, (1, 3, height, width)'
        said = {
            f'feature_{index}': f'Feature map of stride {2 ** (index + 2)}, (1, channels, ...)' for index in range(4)
        }
    else:
        classes, palette = named_classes(source.cfg)
        several = ' or other sizes' if len(sizes) > 1 else ''
        model.short_description = f'Semantic segmentation into {len(classes)} classes: {own["config"]}.'
        model.input_description['image'] = f'RGB image, {sizes[0][1]} x {sizes[0][0]} pixels{several}'
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


def predict_with_coreml(path: Path, part: str) -> Model:
    """The saved model run by Core ML itself, on the processor; needs macOS."""
    import coremltools as ct
    from PIL import Image

    model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit.CPU_ONLY)

    def predict(image: np.ndarray) -> dict[str, np.ndarray]:
        if part == 'segmentor':
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
