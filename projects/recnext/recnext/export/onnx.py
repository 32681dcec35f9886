"""ONNX: one checkpoint to one file, checked by onnx and run in onnxruntime before it is written."""

import importlib.util
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from ..engine.config import named_classes
from ..utils.errors import UserError
from ..utils.files import written_beside
from ..utils.memory import peak_of_process
from .capture import STRIDE, capture, check_free, format_table
from .capture import check_sizes as check_multiples
from .source import Source, load_source
from .verification import Model, find_images
from .verification import verify as verify_saved

PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')

LEAST = 3 * STRIDE
"""Sides of the smallest image of a file without a fixed size, in pixels."""

ROUNDS = 9


def export_onnx(
    config: str,
    checkpoint: str,
    out: str,
    part: str = 'segmentor',
    size: Sequence[Sequence[int]] | None = None,
    output: str = 'labels',
    fuse: str = 'all',
    verify: bool = True,
    images: Sequence[str] | None = None,
    benchmark: bool = False,
    cfg_options: dict | None = None,
) -> str:
    """Export a checkpoint; see ``python tools/export_onnx.py --help``.

    Args:
        config: Path of the config.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        out: File to write, ``.onnx``.
        part: ``'segmentor'``, from pixels to labels, or ``'backbone'``, from normalised images to features.
        size: One fixed size (height, width) for single images. Without it, batches of images of any size from 96 up.
        output: Of a segmentor: ``'labels'``, ``'logits'`` or ``'both'``.
        fuse: See :meth:`segmentor.FastEncoderDecoder.switch_to_deploy`.
        verify: Compare the saved file, run in onnxruntime, with PyTorch.
        images: Image files to verify with.
        benchmark: Measure the latency beside PyTorch's.
        cfg_options: Merged into the config.

    Returns:
        A table of what was made.

    Raises:
        UserError: what does not fit, or a saved model that is wrong; nothing is written.
    """
    began = time.monotonic()
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'ONNX needs packages that are not installed: pip install {" ".join(missing)}')
    import onnx

    path = Path(out)
    check_free(path, '.onnx')
    source = load_source(config, checkpoint, fuse, cfg_options)
    if size and len(size) > 1:
        raise UserError('A file has one fixed size, or any if none is given; found several.')
    crop = tuple(map(int, size[0] if size else source.cfg.crop_size))
    check_multiples([crop])
    # The second shows whether something of the first stayed in a graph that should take any.
    sizes = [crop] if size else [crop, (crop[0] - STRIDE, crop[1] + STRIDE)]
    named, pictures = find_images(source.cfg, images) if verify else ('', [])
    wrapper = source.wrap(part, output)
    program = capture(wrapper, crop, None if size else any_size())
    onnx_program = torch.onnx.export(
        program, dynamo=True, input_names=['image'], output_names=list(wrapper.names), verbose=False
    )
    with written_beside(path) as beside:
        onnx_program.save(str(beside))
        model = onnx.load(str(beside))
        onnx.helper.set_model_props(model, describe(source, part))
        onnx.save(model, str(beside))
        onnx.checker.check_model(str(beside), full_check=True)
        run = open_session(beside, wrapper.names)
        agreement = verify_saved(run, source.original, part, sizes, pictures, named) if verify else None
        if agreement:
            agreement.check('fp32')
        kinds = Counter(node.op_type for node in model.graph.node)
        rows = dict(
            file=out,
            size=f'{beside.stat().st_size / 1e6:.1f} MB',
            image=' x '.join(map(str, crop)) + ' pixels (height x width)'
            if size
            else f'batches of any size, of multiples of {STRIDE} from {LEAST} pixels up',
            operations=f'{kinds.total()}: ' + ', '.join(f'{number} {kind}' for kind, number in kinds.most_common()),
        )
        image = np.zeros((1, 3, *crop), np.float32)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            wrapper(torch.from_numpy(image))
        rows['multiply-adds'] = (
            f'{counter.get_total_flops() / 2e9:.2f} G at {" x ".join(map(str, crop))}, folded: {fuse}'
        )
        rows['precision'] = f'fp32, opset {model.opset_import[0].version}, by torch.export'
        rows['verified'] = str(agreement) if agreement else 'no'
        if benchmark:
            rows['latency'] = compare_latency(run, wrapper, image)
    rows['took'] = f'{time.monotonic() - began:.0f} s, at most {(peak_of_process() or 0) / 1e3:.1f} GB of memory'
    rows['next'] = f"onnxruntime.InferenceSession('{out}').run(None, {{'image': pixels}})"
    return format_table(rows)


def any_size() -> dict[int, Dim]:
    """Dimensions of a batch of images (N, 3, H, W) that may change."""
    sides = {dim: STRIDE * Dim(f'blocks_{dim}', min=LEAST // STRIDE, max=1024) for dim in (2, 3)}
    return {0: Dim('batch', min=1, max=4096), **sides}


def describe(source: Source, part: str) -> dict[str, str]:
    """What a file says of itself: where it is from, and the classes with their colours (RGB)."""
    if part == 'backbone':
        return source.describe()
    classes, palette = named_classes(source.cfg)
    return dict(source.describe(), classes=json.dumps(classes), palette=json.dumps(palette))


def open_session(path: Path, names: Sequence[str]) -> Model:
    """A saved model in onnxruntime on the processor, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda image: dict(zip(names, session.run(None, dict(image=image))))


def compare_latency(run: Model, wrapper: torch.nn.Module, image: np.ndarray) -> str:
    """The same network in onnxruntime and in PyTorch, alternating."""
    tensor = torch.from_numpy(image)
    with torch.no_grad():
        ways = {'onnxruntime': lambda: run(image), 'PyTorch': lambda: wrapper(tensor)}
        seconds = {name: [] for name in ways}
        for _ in range(ROUNDS + 1):
            for name, call in ways.items():
                seconds[name].append(_time(call))
    # The first round warms up.
    times = {name: 1e3 * median(measured[1:]) for name, measured in seconds.items()}
    said = ', '.join(f'{name} {time:.0f} ms' for name, time in times.items())
    ratio = times['PyTorch'] / times['onnxruntime']
    return f'{said} ({ratio:.2f} x), {torch.get_num_threads()} threads, median of {ROUNDS}'


def _time(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
