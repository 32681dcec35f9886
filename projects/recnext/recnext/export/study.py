"""Fewer bits, measured: one checkpoint in every format and precision, and which of its parts bear eight bits."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from ..runtimes.calibration import Calibration
from ..utils.errors import UserError
from ..utils.timing import time_calls
from .backend import Backend, ExportOptions
from .coreml import CoreMLBackend
from .executorch import DELEGATE, ExecutorchBackend, time_outside
from .exporter import size_of
from .images import Images, find_images
from .litert import LitertBackend
from .onnx import OnnxBackend, OnnxModel, open_session
from .onnx_rounding import quantize
from .quantization import find_calibration
from .sizes import ImageSizes
from .source import Source, load_source
from .verification import Agreement, Model, verify


class Target(NamedTuple):
    """A way to export a checkpoint."""

    backend: Backend
    fuse: str = 'all'  # ExecuTorch runs no folded Semantic FPN in 8 bits
    timed: bool = True  # Core ML's files are executed here without Core ML


TARGETS = {
    'onnx fp32': Target(OnnxBackend()),
    'onnx fp16': Target(OnnxBackend('fp16')),
    'onnx int8': Target(OnnxBackend('int8')),
    'executorch fp32': Target(ExecutorchBackend(), 'norms'),
    'executorch int8': Target(ExecutorchBackend('int8'), 'norms'),
    'litert fp32': Target(LitertBackend()),
    'litert fp16': Target(LitertBackend('fp16')),
    'litert int8': Target(LitertBackend('int8')),
    'coreml fp16': Target(CoreMLBackend(), timed=False),
    'coreml linear8': Target(CoreMLBackend(compress='linear8'), timed=False),
    'coreml int8': Target(CoreMLBackend(precision='int8'), timed=False),
}
"""What is measured."""

PARTS = {
    'stem': ('backbone.stem',),
    'token mixers': ('backbone.stages.*.token_mixer',),
    'channel mixers': ('backbone.stages.*.channel_mixer',),
    'folded kernels': ('neck.levels.*.direct', 'neck.levels.*.from_above', 'neck.levels.*.sides'),
    'rest of the neck': ('neck.levels.*.lateral', 'neck.levels.*.fpn_conv', 'neck.levels.*.head'),
    'head': ('decode_head.scale_heads',),
    'last classifier': ('decode_head.conv_seg',),
}
"""Parts of the folded network, by patterns of modules."""

ROUNDS = 9
SLOWEST = 4
NAMES = 36
"""Characters of the column of names."""


class Measured(NamedTuple):
    """One file."""

    name: str
    size: int  # bytes
    agreement: Agreement
    predict: Model
    path: Path

    def __str__(self) -> str:
        network, file = self.agreement.mious
        said = f'{self.name:<{NAMES}} {self.size / 1e6:6.1f} {100 * self.agreement.share:11.2f} %'
        return said if np.isnan(network) else f'{said} {file:7.2f} {file - network:+7.2f}'


def study(
    config: str, checkpoint: str, options: ExportOptions, parts: bool, cfg_options: dict | None = None
) -> Iterator[str]:
    """Export a checkpoint in every way, and compare the files; lines of a table, as they are known.

    Args:
        config: Path of the config, or the name of a release.
        checkpoint: Path or address of the weights.
        options: Size, images and calibration.
        parts: Also measure 8 bits in all parts but one, and in one alone.
        cfg_options: Merged into the config.
    """
    TARGETS['onnx fp32'].backend.check(options)  # what the others are compared with
    import onnx

    source = load_source(config, checkpoint, 'all', cfg_options)
    sources = dict(all=source, norms=source.fold('norms'))
    size = tuple(options.size[0]) if options.size else source.crop_size
    sizes = ImageSizes([size])
    images = find_images(source.cfg, options.images, annotated=True)
    calibration = find_calibration(source, source.wrap('segmentor', 'labels', single=False), options, size)
    yield f'{size[0]} x {size[1]}, verified on {images.named}, calibrated with {calibration}'
    yield f'{"":<{NAMES}} {"MB":>6} {"labels equal":>13} {"mIoU":>7} {"change":>7}'
    with tempfile.TemporaryDirectory() as folder:
        timed = {}
        for name, target in TARGETS.items():
            try:
                target.backend.check(options)
            except UserError as error:  # a package that is not there
                yield f'{name:<{NAMES}} {error}'
                continue
            one = _export(name, target, sources[target.fuse], sizes, images, calibration, Path(folder))
            yield str(one)
            if target.timed:
                timed[name] = one
        yield from _times(timed, next(iter(calibration)))
        plain = onnx.load(timed['onnx fp32'].path)
        for name, kept in _variants(source) if parts else ():
            model = OnnxModel(quantize(plain, replace(calibration, keep_float=kept)))
            path = Path(folder, 'part.onnx')
            model.save(str(path))
            yield str(_measure(name, path, open_session(path), source, sizes, images))


def _export(
    name: str,
    target: Target,
    source: Source,
    sizes: ImageSizes,
    images: Images,
    calibration: Calibration,
    folder: Path,
) -> Measured:
    """A file of a target in a folder, compared."""
    backend = target.backend
    wrapper = source.wrap('segmentor', 'labels', backend.single)
    model = backend.convert(wrapper, sizes, source, calibration if backend.calibrated else None)
    path = Path(folder, name.replace(' ', '_')).with_suffix(backend.suffix)
    model.save(str(path))
    return _measure(name, path, backend.read(path).predict, source, sizes, images)


def _variants(source: Source) -> Iterator[tuple[str, Sequence[str]]]:
    """8 bits in all parts but one, then in one alone: a name, and the patterns of what stays in floating point."""
    names = [name for name, _ in source.folded.named_modules()]
    there = {part: patterns for part, patterns in PARTS.items() if _fits(patterns, names)}
    for part, patterns in there.items():
        yield f'onnx int8, all but {part}', patterns
    for part in there:
        yield f'onnx int8, {part} alone', [one for other in there if other != part for one in PARTS[other]]


def _fits(patterns: Sequence[str], names: Sequence[str]) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _measure(name: str, path: Path, predict: Model, source: Source, sizes: ImageSizes, images: Images) -> Measured:
    return Measured(
        name, size_of(path), verify(predict, source.original, 'segmentor', sizes.sizes, images), predict, path
    )


def _times(timed: Mapping[str, Measured], image: np.ndarray) -> Iterator[str]:
    """How long an image takes with each file, alternating, and in which operations."""
    calls = {name: (lambda one=one: one.predict(image)) for name, one in timed.items()}
    seconds = {name: median(measured) for name, measured in time_calls(calls, ROUNDS).items()}
    first = next(iter(seconds.values()))
    for name, time in seconds.items():
        said = f'{name:<{NAMES}} {1e3 * time:6.0f} ms, {first / time:.2f} x'
        path = timed[name].path
        if path.suffix in SHARES:
            shares = SHARES[path.suffix](path, image).most_common(SLOWEST)
            said += '; slowest: ' + ', '.join(f'{kind} {share:.0%}' for kind, share in shares)
        yield said


def _onnx_shares(path: Path, image: np.ndarray) -> Counter[str]:
    """Shares of the kinds of operations in onnxruntime's time for an image."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(''))
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    session.run(None, dict(image=image))
    taken: Counter[str] = Counter()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get('cat') == 'Node' and event['name'].endswith('_kernel_time'):
            taken[event['args']['op_name']] += event['dur']
    total = taken.total()
    return Counter({kind: time / total for kind, time in taken.items()})


def _executorch_shares(path: Path, image: np.ndarray) -> Counter[str]:
    """Shares of the kinds of operations in ExecuTorch's time for an image; XNNPACK's are one."""
    outside = time_outside(path, image.shape[2:])
    return outside + Counter({DELEGATE: 1 - outside.total()})


SHARES: dict[str, Callable[[Path, np.ndarray], Counter[str]]] = {'.onnx': _onnx_shares, '.pte': _executorch_shares}
"""What measures where the time of a file goes, by the suffix of the file; LiteRT tells nothing of it in Python."""
