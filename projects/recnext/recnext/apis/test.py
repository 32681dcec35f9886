"""Testing a checkpoint as a config says."""

import dataclasses

from mmengine.config import ConfigDict

from ..engine.checks import check_checkpoint, set_data_root
from ..engine.config import add_hook, is_segmentor, load_config, set_work_dir
from ..engine.config_check import check_keys
from ..engine.distributed import joined_processes
from ..engine.runner import build_runner
from ..models.deploy import DEFAULT, Deployment
from ..utils.errors import UserError
from ..utils.files import make_folder
from ..weights.releases import find_checkpoint

TRAINING_KEYS = ('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler')
"""What the Runner needs for training only; it takes either all of them or none."""


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
    data_root: str | None = None,
    cfg_options: dict | None = None,
    launcher: str = 'none',
) -> dict[str, float]:
    """Evaluate a checkpoint; see ``python tools/test.py --help``.

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
        data_root: Of the dataset, in place of the config's.
        cfg_options: Merged into the config.
        launcher: What started the processes: ``'none'``, ``'pytorch'`` (torchrun) or ``'slurm'``.

    Returns:
        The metrics, in per cent.

    Raises:
        UserError: what is missing or does not fit, before anything is written.
    """
    cfg = load_config(config, cfg_options)
    check_keys(cfg)
    cfg.launcher = launcher
    set_work_dir(cfg, config, work_dir)
    set_data_root(cfg, data_root, ('test',))
    cfg.load_from = str(find_checkpoint(checkpoint))
    check_checkpoint(cfg, cfg.load_from)
    # Without a training set, too: mmseg's visualization hook would build it to learn the iteration.
    cfg.update(dict.fromkeys(TRAINING_KEYS))
    add_hook(cfg, 'DeployHook', **dataclasses.asdict(deployment))
    if batch_size:
        cfg.test_dataloader.batch_size = batch_size
    segmentor = is_segmentor(cfg)
    if out and not segmentor:
        raise UserError('--out saves label maps, and a classifier makes none. --show-dir saves pictures.')
    if show or show_dir:
        drawing = dict(draw=True) if segmentor else dict(enable=True, out_dir=show_dir)
        cfg.default_hooks.visualization.update(interval=1, show=show, wait_time=wait_time, **drawing)
    if show_dir and segmentor:
        cfg.visualizer.picture_dir = show_dir
    if tta:
        if 'tta_pipeline' not in cfg:
            raise UserError(f'{config} has no tta_pipeline; --tta needs one.')
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    if out:
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        for evaluator in evaluators:
            evaluator.update(output_dir=out, keep_results=True)
    for folder in filter(None, (cfg.work_dir, out, show_dir)):
        make_folder(folder)
    with joined_processes(cfg):
        return build_runner(cfg).test()
