"""Training as a config says."""

import importlib.util

import torch
from mmengine.config import Config

from ..engine.checks import choose_weights, set_data_root
from ..engine.config import add_hook, is_segmentor, load_config, set_work_dir
from ..engine.config_check import check_keys, check_parts_fit
from ..engine.distributed import get_process_info, joined_processes
from ..engine.optim import use_bfloat16
from ..engine.runner import build_runner
from ..utils.errors import UserError
from ..utils.files import make_folder, remove_partial_files


def train(
    config: str,
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    channels_last: bool = False,
    compile: bool = False,
    tensorboard: bool = False,
    data_root: str | None = None,
    cfg_options: dict | None = None,
    launcher: str = 'none',
) -> None:
    """Train as the config says; see ``python tools/train.py --help``.

    Args:
        config: Path of the config.
        work_dir: Where logs and checkpoints go; ``work_dirs/<config>`` if None.
        resume: ``'auto'`` for the newest checkpoint of ``work_dir``, or the path of one.
        amp: Mixed precision in bfloat16.
        auto_scale_lr: Scale the learning rate with the number of images an iteration.
        channels_last: Keep weights and activations in channels-last order.
        compile: Compile the network.
        tensorboard: Write TensorBoard files beside the JSON lines.
        data_root: Of the dataset, in place of the config's.
        cfg_options: Merged into the config.
        launcher: What started the processes: ``'none'``, ``'pytorch'`` (torchrun) or ``'slurm'``.

    Raises:
        UserError: what is missing or does not fit, before the first iteration.
    """
    cfg = load_config(config, cfg_options)
    check_keys(cfg)
    cfg.launcher = launcher
    set_work_dir(cfg, config, work_dir)
    set_data_root(cfg, data_root, ('train', 'val'))
    together = get_process_info(launcher).world_size if cfg.get('sync_bn') and torch.cuda.is_available() else 1
    check_parts_fit(cfg, is_segmentor(cfg), together)
    if amp:
        use_bfloat16(cfg)
    if auto_scale_lr:
        cfg.auto_scale_lr.enable = True
    if channels_last:
        add_hook(cfg, 'ChannelsLastHook')
    if compile:
        add_hook(cfg, 'CompileHook')
    if tensorboard:
        if importlib.util.find_spec('tensorboard') is None:
            raise UserError('--tensorboard needs the package tensorboard: pip install tensorboard')
        cfg.visualizer.vis_backends = [*cfg.visualizer.vis_backends, dict(type='TensorboardVisBackend')]
    choose_weights(cfg, resume)
    make_folder(cfg.work_dir)
    remove_partial_files(cfg.work_dir)
    with joined_processes(cfg):
        _run_training(cfg)


def _run_training(cfg: Config) -> None:
    runner = build_runner(cfg)
    runner.logger.info(describe_batch(cfg, runner.world_size))
    if cfg.optim_wrapper.type == 'AmpOptimWrapper' and cfg.optim_wrapper.get('dtype') in (None, 'float16'):
        runner.logger.warning('float16: the recursion of RecNeXt is known to overflow in it. --amp means bfloat16.')
    runner.train()


def describe_batch(cfg: Config, world_size: int) -> str:
    """How many images an iteration takes and the learning rate for them, and how that compares with the recipe."""
    batch_size = cfg.train_dataloader.batch_size
    images, recipe = world_size * batch_size, cfg.auto_scale_lr.base_batch_size
    lr = cfg.optim_wrapper.optimizer.lr * (images / recipe if cfg.auto_scale_lr.enable else 1)
    said = f'{images} images an iteration ({world_size} processes x {batch_size}), learning rate {lr:g}.'
    if images == recipe:
        return f'{said} As in the recipe.'
    scaled = 'scaled accordingly' if cfg.auto_scale_lr.enable else 'not scaled; --auto-scale-lr does that'
    return f'{said} The recipe has {recipe} images; the learning rate is {scaled}.'
