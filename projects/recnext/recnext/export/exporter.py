"""One checkpoint to one file for another runtime: the same steps for every format, and nothing wrong left behind."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..utils.errors import UserError
from ..utils.files import atomic_write
from ..utils.memory import peak_of_process
from .backend import Backend, ExportOptions
from .capture import Wrapper
from .images import Images, find_images
from .quantization import find_calibration
from .source import load_source
from .verification import verify

DEFAULT = ExportOptions()


def export(
    backend: Backend,
    config: str,
    checkpoint: str,
    out: str,
    options: ExportOptions = DEFAULT,
    cfg_options: dict | None = None,
) -> str:
    """Export a checkpoint, and compare the file with PyTorch before it gets its name.

    Args:
        backend: The format, such as :class:`.coreml.CoreMLBackend` or :class:`.onnx.OnnxBackend`.
        config: Path of the config, or the name of a release.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        out: File to write.
        options: What all formats have.
        cfg_options: Merged into the config.

    Returns:
        A table of what was made.

    Raises:
        UserError: what does not fit, or a saved model that is wrong; nothing is written.
    """
    began = time.monotonic()
    path = Path(out)
    backend.check(options)
    _check_free(path, backend.suffix)
    source = load_source(config, checkpoint, options.fuse, cfg_options)
    sizes = backend.choose_sizes([tuple(one) for one in options.size or ()], source)
    images = find_images(source.cfg, options.images, backend.calibrated) if options.verify else Images('', [])
    wrapper = source.wrap(options.part, options.output, backend.single)
    calibration = find_calibration(source, wrapper, options, sizes.sizes[0]) if backend.calibrated else None
    converted = backend.convert(wrapper, sizes, source, calibration)
    with atomic_write(path) as beside:
        converted.save(str(beside))
        saved = backend.read(beside)
        verified = 'no'
        if options.verify:
            agreement = verify(saved.predict, source.original, options.part, sizes.sizes, images)
            agreement.check(backend.tolerance, options.max_drop)
            verified = str(agreement)
        size = size_of(beside)
    kinds = ', '.join(f'{number} {kind}' for kind, number in saved.operations.most_common())
    rows = dict(
        file=out,
        size=f'{size / 1e6:.1f} MB',
        image=str(sizes),
        operations=f'{saved.operations.total()}: {kinds}',
    )
    first = sizes.sizes[0]
    multiply_adds = count_multiply_adds(wrapper, first)
    rows['multiply-adds'] = f'{multiply_adds / 1e9:.2f} G at {first[0]} x {first[1]}, folded: {options.fuse}'
    rows['precision'] = backend.stored
    rows['format'] = f'{saved.format}, by torch.export'
    if calibration is not None:
        rows['calibrated'] = f'with {calibration}'
        rows['kept float'] = ', '.join(options.keep_float) or 'nothing'
    rows['verified'] = verified
    if options.verify and backend.calibrated:
        rows['mIoU'] = agreement.describe_miou()
    if source.without_figures:
        rows['figures'] = source.without_figures
    peak = peak_of_process()
    memory = '' if peak is None else f', at most {peak / 1e3:.1f} GB of memory'
    rows['took'] = f'{time.monotonic() - began:.0f} s{memory}'
    if options.benchmark:
        rows['latency'] = backend.measure(path, saved, wrapper, first)
    rows['next'] = backend.next_step(path)
    return _format_table(rows)


def _check_free(path: Path, suffix: str) -> None:
    """Make sure that a file can be called so."""
    if suffix and path.suffix != suffix:
        raise UserError(f'The file to write ends in {suffix}; found {path.name}.')
    if path.exists():
        raise UserError(f'{path} is there already. Remove it, or choose another name.')


def size_of(path: Path) -> int:
    """Of a file, or of all the files of a package, in bytes."""
    files = [file for file in path.rglob('*') if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def count_multiply_adds(wrapper: Wrapper, size: tuple[int, int]) -> int:
    """Of the convolutions and matrix products for one image (height, width)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        wrapper(torch.zeros(1, 3, *size))
    return counter.get_total_flops() // 2


def _format_table(rows: Mapping[str, str]) -> str:
    """Rows of a name and a value."""
    return '\n'.join(f'{name:<13} {value}' for name, value in rows.items())
