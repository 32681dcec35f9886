"""Testing a checkpoint as a config says."""

import dataclasses

from ..checkpoints.releases import resolve_checkpoint
from ..runtimes.deployment import DEFAULT, Deployment
from ..utils.devices import AUTO, find_device
from ..utils.errors import UserError
from ..utils.files import make_folder
from .builder import build_on_meta
from .checks import Start, check_checkpoint, set_data_root
from .config import (
    TRAINING_KEYS,
    add_hook,
    average_augmented,
    is_segmentor,
    load_config,
    set_work_dir,
    show_pictures,
)
from .config_check import check_keys
from .distributed import get_process_info, joined_processes
from .runner import build_runner, run_on


def test(
    config: str,
    checkpoint: str,
    work_dir: str | None = None,
    out: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2,
    tta: bool = False,
    deployment: Deployment = DEFAULT,
    batch_size: int | None = None,
    overlap: bool = False,
    device: str = AUTO,
    data_root: str | None = None,
    cfg_options: dict | None = None,
    launcher: str = 'none',
) -> dict[str, float]:
    """Evaluate a checkpoint; see ``recnext test --help``.

    Args:
        config: Path of the config.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        work_dir: Where logs go; ``work_dirs/<config>`` if None.
        out: Folder for the label maps, as PNG in the numbering of the annotations.
        show: Open a window for each picture.
        show_dir: Folder for pictures of image, truth and prediction.
        wait_time: Seconds that each window stays.
        tta: Average over the scales and flips of the config.
        deployment: The form in which the network is run.
        batch_size: Images in a batch; those of one size go through the network together.
        overlap: Start a batch before the last one is measured: :class:`~overlapped_testing.OverlappedTestLoop`.
        device: See :func:`device.find_device`; of several processes each takes one of a kind.
        data_root: Of the dataset, in place of the config's.
        cfg_options: Merged into the config.
        launcher: What started the processes: ``'none'``, ``'pytorch'`` (torchrun) or ``'slurm'``.

    Returns:
        The metrics, in per cent.

    Raises:
        UserError: what is missing or does not fit, before anything is written.
    """
    where = find_device(device, get_process_info(launcher).local_rank)
    cfg = load_config(config, cfg_options)
    check_keys(cfg)
    if out and not is_segmentor(cfg):
        raise UserError('--out saves label maps, and a classifier makes none. --show-dir saves pictures.')
    cfg.launcher = launcher
    set_work_dir(cfg, config, work_dir)
    meta_model = build_on_meta(cfg.model)
    set_data_root(cfg, data_root, ('test',), meta_model)
    cfg.load_from = str(resolve_checkpoint(checkpoint))
    start = Start(cfg.load_from, check_checkpoint(cfg, cfg.load_from, meta_model))
    # Without a training set, too: mmseg's visualization hook would build it to learn the iteration.
    cfg.update(dict.fromkeys(TRAINING_KEYS))
    add_hook(cfg, 'DeployHook', **dataclasses.asdict(deployment))
    if batch_size:
        cfg.test_dataloader.batch_size = batch_size
    if overlap:
        cfg.test_cfg.type = 'OverlappedTestLoop'
        cfg.test_dataloader.pin_memory = where.type != 'cpu'
    if show or show_dir:
        show_pictures(cfg, show, show_dir, wait_time)
    if tta:
        average_augmented(cfg)
    if out:
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        for evaluator in evaluators:
            evaluator.update(output_dir=out, keep_results=True)
    for folder in filter(None, (cfg.work_dir, out, show_dir)):
        make_folder(folder)
    with run_on(where), joined_processes(cfg, where):
        return build_runner(cfg, start).test()
