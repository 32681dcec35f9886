"""The comparison with mmseg or mmpretrain in testing: checks what is asked for, measures, writes table and picture."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from ..checkpoints.files import read_checkpoint
from ..checkpoints.releases import resolve_checkpoint
from ..openmmlab.builder import build_on_meta
from ..openmmlab.checks import check_fit, set_data_root
from ..openmmlab.config import is_segmentor, load_config, set_work_dir
from ..openmmlab.deployable import DeployableModel
from ..utils.devices import AUTO, describe_device, find_device
from ..utils.errors import UserError
from ..utils.files import atomic_write, make_folder
from . import label_maps, measurement
from .tables import draw_results, format_results


def benchmark(
    config: str,
    checkpoint: str | None = None,
    images: int = 20,
    rounds: int = 5,
    copies_at: tuple[int, int] | None = None,
    engines: Sequence[str] = (),
    calibrate: str | None = None,
    sweep: bool = False,
    device: str = AUTO,
    work_dir: str | None = None,
    data_root: str | None = None,
    cfg_options: dict | None = None,
) -> dict:
    """Compare with mmseg's segmentor or mmpretrain's classifier; see ``recnext benchmark --help``.

    Writes ``benchmark.json`` and ``benchmark.png`` into the work dir and prints a table.

    Returns:
        What is in the JSON file.

    Raises:
        UserError: what is missing or does not fit, before anything is measured.
    """
    cfg = load_config(config, cfg_options)
    if not is_segmentor(cfg) and (copies_at or sweep):
        raise UserError(f'--copies-at and --sweep are for segmentors, and {config} is a config of a classifier.')
    checkpoint = prepare_comparison(cfg, config, checkpoint, work_dir, data_root)
    where = find_device(device)
    stock = measurement.STOCK if is_segmentor(cfg) else measurement.STOCK_CLASSIFIER
    ways = measurement.contenders(where, engines, calibrate, stock)
    make_folder(cfg.work_dir)
    MMLogger.get_current_instance().setLevel('ERROR')  # or every tensor of random weights would be named
    init_default_scope(cfg.default_scope)
    with tempfile.TemporaryDirectory() as folder:
        if copies_at:
            measurement.copies_at(cfg, copies_at, images, Path(folder))
        weights = measurement.initial_weights(cfg, checkpoint)
        contenders = measurement.measure(cfg, weights, images, rounds, ways, where)
    results = dict(
        config=Path(config).stem,
        checkpoint=checkpoint and Path(checkpoint).name,
        copies_at=copies_at,
        rounds=rounds,
        machine=dict(
            device=describe_device(where),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            peak_gflops=measurement.measure_peak(where),
        ),
        contenders=contenders,
        sweep=label_maps.sweep(rounds, where) if sweep else [],
    )
    print(format_results(results))
    write_results(results, Path(cfg.work_dir, 'benchmark.json'), draw_results)
    return results


def prepare_comparison(
    cfg: Config, config: str, checkpoint: str | None, work_dir: str | None, data_root: str | None
) -> str | None:
    """Point a config at its data and its work dir; the place of its checkpoint, if it has one.

    Raises:
        UserError: what is missing or does not fit.
    """
    set_work_dir(cfg, config, work_dir)
    meta_model = build_on_meta(cfg.model)
    set_data_root(cfg, data_root, ('test',), meta_model.num_classes)
    cfg.setdefault('default_scope', 'mmseg')
    if 'data_preprocessor' in cfg:  # mmpretrain's place for it, from where MMEngine's Runner takes it to the model
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if checkpoint:
        checkpoint = str(resolve_checkpoint(checkpoint))
        check_fit(meta_model, checkpoint, read_checkpoint(checkpoint))
    elif not isinstance(meta_model, DeployableModel):
        raise UserError(
            f'model.type is {cfg.model.type}; FastEncoderDecoder and RecNeXtClassifier are what can be compared with '
            "mmseg's and mmpretrain's own."
        )
    return checkpoint


def write_results(results: dict, place: Path, draw: Callable[[dict, Path], None]) -> None:
    """Write results as JSON, and beside it the picture of the same name that ``draw`` makes of them."""
    picture = place.with_suffix('.png')
    with atomic_write(place) as beside:
        beside.write_text(json.dumps(results, indent=2))
    with atomic_write(picture) as beside:
        draw(results, beside)
    print(f'Written: {place} and {picture}')
