"""Training as a config says."""

import importlib.util

from mmengine.config import Config

from ..engine.checks import Start, choose_weights, set_data_root
from ..engine.config import add_hook, is_segmentor, load_config, set_work_dir
from ..engine.config_check import check_keys, check_parts_fit
from ..engine.distributed import can_sync_norms, get_process_info, joined_processes
from ..engine.optim import use_bfloat16
from ..engine.runner import build_runner, run_on
from ..models.builder import build_skeleton
from ..utils.device import find_device
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
    """Train as the config says; see ``recnext train --help``.

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
    if not cfg.get('train_dataloader'):
        raise UserError(
            f'{config} has no train_dataloader, and so nothing to train on. To train on from its weights, name them in '
            'load_from of a config of your own.'
        )
    cfg.launcher = launcher
    set_work_dir(cfg, config, work_dir)
    skeleton = build_skeleton(cfg.model)
    set_data_root(cfg, data_root, ('train', 'val'), skeleton)
    process = get_process_info(launcher)
    where = find_device(process=process.local_rank)
    together = process.world_size if cfg.get('sync_bn') and can_sync_norms(where) else 1
    check_parts_fit(cfg, is_segmentor(cfg), together, skeleton)
    if amp:
        use_bfloat16(cfg)
    if auto_scale_lr:
        scale_learning_rate(cfg)
    if channels_last:
        add_hook(cfg, 'ChannelsLastHook')
    if compile:
        add_hook(cfg, 'CompileHook')
    if tensorboard:
        write_tensorboard_files(cfg)
    start = choose_weights(cfg, resume, skeleton)
    make_folder(cfg.work_dir)
    remove_partial_files(cfg.work_dir)
    with run_on(where), joined_processes(cfg, where):
        _run_training(cfg, start)


def _run_training(cfg: Config, start: Start | None) -> None:
    runner = build_runner(cfg, start)
    runner.logger.info(describe_batch(cfg, runner.world_size))
    if start and start.damaged:
        runner.logger.warning(f'{" ".join(map(str, start.damaged))} Training goes on from {start.path}.')
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and cfg.optim_wrapper.get('dtype') in (None, 'float16'):
        runner.logger.warning('float16: the recursion of RecNeXt is known to overflow in it. --amp means bfloat16.')
    runner.train()


def scale_learning_rate(cfg: Config) -> None:
    """Set a config to scale the learning rate with the images an iteration; in place.

    Raises:
        UserError: it does not say for how many images its learning rate is.
    """
    if not (cfg.get('auto_scale_lr') or {}).get('base_batch_size'):
        raise UserError(
            'The config does not say for how many images an iteration its learning rate is, which --auto-scale-lr '
            'needs. Write auto_scale_lr = dict(base_batch_size=16), or as many as its name says (GPUs x images).'
        )
    cfg.auto_scale_lr.enable = True


def write_tensorboard_files(cfg: Config) -> None:
    """Set a config to write TensorBoard files beside its other logs; in place.

    Raises:
        UserError: TensorBoard is not installed.
    """
    if importlib.util.find_spec('tensorboard') is None:
        raise UserError('--tensorboard needs the package tensorboard: pip install tensorboard')
    visualizer = cfg.get('visualizer') or dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
    backends = [*(visualizer.get('vis_backends') or []), dict(type='TensorboardVisBackend')]
    cfg.visualizer = {**visualizer, 'vis_backends': backends}


def describe_batch(cfg: Config, world_size: int) -> str:
    """How many images an iteration takes and the learning rate for them, and how that compares with the recipe."""
    batch_size = cfg.train_dataloader.get('batch_size', 1)
    images, scaling = world_size * batch_size, cfg.get('auto_scale_lr') or {}
    recipe, scaled = scaling.get('base_batch_size'), scaling.get('enable', False)
    said = f'{images} images an iteration ({world_size} processes x {batch_size})'
    lr = (cfg.optim_wrapper.get('optimizer') or {}).get('lr')
    if lr is not None:
        said += f', learning rate {lr * (images / recipe if scaled else 1):g}'
    if recipe is None:
        return f'{said}. The config does not say for how many its learning rate is.'
    if images == recipe:
        return f'{said}. As in the recipe.'
    how = 'scaled accordingly' if scaled else 'not scaled; --auto-scale-lr does that'
    return f'{said}. The recipe has {recipe} images; the learning rate is {how}.'
