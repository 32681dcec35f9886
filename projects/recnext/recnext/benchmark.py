"""The benchmark behind the command line: checks, measurements, and what is made of them."""

import json
import tempfile
from pathlib import Path

import torch
from mmengine.registry import init_default_scope

from . import measurement
from .benchmark_report import describe, draw
from .checkpoint import write_atomically
from .errors import UserError
from .launch import check_checkpoint, load_segmentor_config, set_data_root, set_work_dir
from .models import build_skeleton
from .released import find_checkpoint
from .segmentor import FastEncoderDecoder
from .writing import make_folder


def benchmark(
    config: str,
    checkpoint: str | None = None,
    images: int = 20,
    rounds: int = 5,
    copies_at: tuple[int, int] | None = None,
    compile: bool = False,
    sweep: bool = False,
    device: str = 'cpu',
    work_dir: str | None = None,
    data_root: str | None = None,
    cfg_options: dict | None = None,
) -> dict:
    """Compare with mmseg's segmentor; see ``python tools/benchmark.py --help``.

    Writes ``benchmark.json`` and ``benchmark.png`` into the work dir and prints a table.

    Returns:
        What is in the JSON file.

    Raises:
        UserError: what is missing or does not fit, before anything is measured.
    """
    cfg = load_segmentor_config(config, cfg_options)
    set_work_dir(cfg, config, work_dir)
    set_data_root(cfg, data_root, ('test',))
    if checkpoint:
        checkpoint = str(find_checkpoint(checkpoint))
        check_checkpoint(cfg, checkpoint)
    elif not isinstance(build_skeleton(cfg.model), FastEncoderDecoder):
        raise UserError(f'model.type is {cfg.model.type}; FastEncoderDecoder is what can be compared with mmseg.')
    where = measurement.find_device(device)
    make_folder(cfg.work_dir)
    init_default_scope('mmseg')
    with tempfile.TemporaryDirectory() as folder:
        if copies_at:
            measurement.copies_at(cfg, copies_at, images, Path(folder))
        weights = measurement.initial_weights(cfg, checkpoint)
        contenders = measurement.measure(cfg, weights, images, rounds, compile, where)
    results = dict(
        config=Path(config).stem,
        checkpoint=checkpoint and Path(checkpoint).name,
        copies_at=copies_at,
        rounds=rounds,
        machine=dict(
            device=torch.cuda.get_device_name(where) if where.type == 'cuda' else 'CPU',
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            peak_gflops=measurement.measure_peak(where),
        ),
        contenders=contenders,
        sweep=measurement.sweep(rounds, where) if sweep else [],
    )
    print(describe(results))
    folder = Path(cfg.work_dir)
    write_atomically(folder / 'benchmark.json', lambda file: file.write(json.dumps(results, indent=2).encode()))
    write_atomically(folder / 'benchmark.png', lambda file: draw(results, file))
    print(f'Written: {folder / "benchmark.json"} and {folder / "benchmark.png"}')
    return results
