"""Training as a config says."""

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

from mmengine import fileio
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook

from ..checkpoints.files import read_checkpoint
from ..checkpoints.folder import write_folder
from ..checkpoints.keys import get_state_dict
from ..utils.devices import SLOW_IN_16_BITS, find_device, lacks_half_precision
from ..utils.errors import StartAgain, UserError
from ..utils.files import make_folder, remove_partial_files, sha256_of
from ..utils.signals import noted_stop_signals
from .builder import build_on_meta
from .checks import Start, choose_weights, set_data_root
from .config import add_hook, is_segmentor, load_config, name_of, set_work_dir
from .config_check import check_keys, check_parts_fit, named_mistakes
from .describe import describe
from .distributed import can_sync_norms, check_same_start, get_process_info, joined_processes
from .hooks import unwrap
from .loops import use_bfloat16
from .resume import write_atomically
from .runner import GuardedRunner, build_runner, run_on
from .stop_at_signal import StopAtSignalHook, StoppedInEpoch
from .store import use_store


@dataclass
class TrainOptions:
    """How :func:`train` trains, beside what the config says."""

    work_dir: str | None = None
    """Where logs and checkpoints go; ``work_dirs/<config>`` if None."""
    resume: str | None = None
    """``'auto'`` for the newest checkpoint of the run, or the path of one; None as the config says."""
    amp: bool = False
    """Mixed precision in bfloat16."""
    auto_scale_lr: bool = False
    """Scale the learning rate with the number of images per iteration."""
    channels_last: bool = False
    """Keep weights and activations in channels-last order."""
    compile: bool = False
    """Compile the network."""
    tensorboard: bool = False
    """Write TensorBoard files beside the JSON lines."""
    wandb: str | None = None
    """Project of Weights & Biases to log to; ``''`` for one of the config's name."""
    mlflow: str | None = None
    """Address of the MLflow server to log to."""
    total_batch_size: int | None = None
    """Images an iteration of all processes together, in place of the config's for each."""
    store: str | None = None
    """Where checkpoints go, and are fetched from to go on, as ``s3://bucket/runs``; see :func:`use_store`."""
    data_root: str | None = None
    """Folder of the dataset, in place of the config's."""
    cfg_options: dict | None = None
    """Merged into the config."""
    launcher: str = 'none'
    """``'pytorch'`` (torchrun), ``'slurm'`` or ``'none'``, which started the processes."""


def train(config: str, options: TrainOptions = TrainOptions()) -> None:
    """Train as the config says; see ``recnext train --help``.

    Args:
        config: Path of the config.
        options: What the user wants beside it.

    Raises:
        UserError: what is missing or does not fit, before the first iteration.
        StartAgain: a signal has stopped training; it goes on with ``resume='auto'``.
    """
    cfg = load_config(config, options.cfg_options)
    check_keys(cfg)
    if not cfg.get('train_dataloader'):
        raise UserError(
            f'{config} has no train_dataloader, and so nothing to train on. To train on from its weights, name them in '
            'load_from of a config of your own.'
        )
    cfg.launcher = options.launcher
    set_work_dir(cfg, config, options.work_dir)
    resume = use_store(cfg, options.store, options.resume)
    meta_model = build_on_meta(cfg.model)
    set_data_root(cfg, options.data_root, ('train', 'val'), meta_model.num_classes)
    process = get_process_info(options.launcher)
    device = find_device(process=process.local_rank)
    if options.total_batch_size is not None:
        share_batch(cfg, options.total_batch_size, process.world_size)
    sync_world_size = process.world_size if cfg.get('sync_bn') and can_sync_norms(device) else 1
    check_parts_fit(cfg, is_segmentor(cfg), meta_model, sync_world_size)
    _apply(cfg, options, name_of(config, cfg))
    start = choose_weights(cfg, resume, meta_model)
    make_folder(cfg.work_dir)
    remove_partial_files(cfg.work_dir)
    with run_on(device), joined_processes(cfg, device):
        stopped = _run_training(cfg, start)
    if stopped:
        raise StartAgain(stopped)


def _apply(cfg: Config, options: TrainOptions, name: str) -> None:
    """Set a config to train as the options say; in place."""
    write_atomically(cfg)
    if options.amp:
        use_bfloat16(cfg)
    if options.auto_scale_lr:
        scale_learning_rate(cfg)
    if options.channels_last:
        add_hook(cfg, 'ChannelsLastHook')
    if options.compile:
        add_hook(cfg, 'CompileHook')
    if options.tensorboard:
        add_tracker(cfg, '--tensorboard', 'tensorboard', type='TensorboardVisBackend')
    if options.wandb is not None:
        add_tracker(cfg, '--wandb', 'wandb', type='WandbVisBackend', init_kwargs=dict(project=options.wandb or name))
    if options.mlflow:
        add_tracker(cfg, '--mlflow', 'mlflow', type='MLflowVisBackend', tracking_uri=options.mlflow, exp_name=name)


def _run_training(cfg: Config, start: Start) -> str | None:
    """Train to the end, or until a signal; then say what training goes on from."""
    runner = build_runner(cfg, start)
    check_same_start(start.content['meta']['iter'] if cfg.resume else None)
    runner.logger.info(describe_batch(cfg, runner.world_size))
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and cfg.optim_wrapper.get('dtype') in (None, 'float16'):
        runner.logger.warning('float16: the recursion of RecNeXt is known to overflow in it. --amp means bfloat16.')
    bfloat16 = cfg.optim_wrapper.get('type') == 'Bfloat16OptimWrapper'  # mmengine's own refuses a CPU
    if bfloat16 and lacks_half_precision(next(runner.model.parameters()).device):
        runner.logger.warning(f'{SLOW_IN_16_BITS} Train without --amp.')
    with noted_stop_signals() as request:
        hook = StopAtSignalHook(request)
        runner.register_hook(hook)
        try:
            with named_mistakes('', cfg):
                runner.train()
        except StoppedInEpoch:
            runner.call_hook('after_train')
    if hook.stopped is None and is_main_process():
        _save_model(runner, cfg)
    return hook.stopped


def _save_model(runner: GuardedRunner, cfg: Config) -> None:
    """Leave the best checkpoint, or the last where none was measured, in ``model/`` as ``recnext.load`` takes it."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    of_several = [path for hook in hooks for path in getattr(hook, 'best_ckpt_path_dict', {}).values()]
    best = [getattr(hook, 'best_ckpt_path', None) for hook in hooks]
    checkpoint = next(filter(None, (*best, *of_several, *(hook.last_ckpt for hook in hooks))), None)
    if not checkpoint or not is_segmentor(cfg):
        return
    folder, metainfo = Path(cfg.work_dir, 'model'), runner.train_dataloader.dataset.metainfo
    try:
        description = describe(cfg, unwrap(runner.model), metainfo['classes'], metainfo['palette'])
        with fileio.get_local_path(checkpoint) as file:
            weights, sha256 = get_state_dict(read_checkpoint(file)), sha256_of(file)
        source = dict(file=Path(checkpoint).name, file_sha256=sha256)
        write_folder(folder, replace(description, provenance=source), weights)
        runner.logger.info(f'{folder} has {source["file"]} for recnext.load and recnext predict.')
    except (UserError, KeyError, TypeError, OSError) as error:  # no reason to fail
        runner.logger.info(f'No folder for recnext.load: {error}')


def share_batch(cfg: Config, total: int, processes: int) -> None:
    """Set a config to train on so many images per iteration, of all processes together; in place.

    Raises:
        UserError: they cannot be shared out evenly.
    """
    if total % processes:
        raise UserError(
            f'--total-batch-size {total} cannot be shared out among {processes} processes: expected a multiple of '
            'their number, and of every other number of processes that training may go on with.'
        )
    cfg.train_dataloader.batch_size = total // processes


def scale_learning_rate(cfg: Config) -> None:
    """Set a config to scale the learning rate with the images per iteration; in place.

    Raises:
        UserError: it does not say for how many images its learning rate is.
    """
    if not (cfg.get('auto_scale_lr') or {}).get('base_batch_size'):
        raise UserError(
            'The config does not say for how many images per iteration its learning rate is, which --auto-scale-lr '
            'needs. Write auto_scale_lr = dict(base_batch_size=16), or as many as its name says (GPUs x images).'
        )
    cfg.auto_scale_lr.enable = True


def add_tracker(cfg: Config, option: str, package: str, **backend: object) -> None:
    """Set a config to log to one of mmengine's backends beside its others; in place.

    Args:
        cfg: Of the run.
        option: By which the user asks for it.
        package: That it needs.
        backend: Its config.

    Raises:
        UserError: the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f'{option} needs the package {package}: pip install {package}')
    visualizer = cfg.get('visualizer') or dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
    cfg.visualizer = {**visualizer, 'vis_backends': [*(visualizer.get('vis_backends') or []), backend]}


def describe_batch(cfg: Config, world_size: int) -> str:
    """How many images an iteration takes and the learning rate for them, and how that compares with the recipe."""
    batch_size = cfg.train_dataloader.get('batch_size', 1)
    images, scaling = world_size * batch_size, cfg.get('auto_scale_lr') or {}
    recipe, scaled = scaling.get('base_batch_size'), scaling.get('enable', False)
    said = f'{images} images per iteration ({world_size} processes x {batch_size})'
    lr = (cfg.optim_wrapper.get('optimizer') or {}).get('lr')
    if lr is not None:
        said += f', learning rate {lr * (images / recipe if scaled else 1):g}'
    if recipe is None:
        return f'{said}. The config does not say for how many its learning rate is.'
    if images == recipe:
        return f'{said}. As in the recipe.'
    how = 'scaled accordingly' if scaled else 'not scaled; --auto-scale-lr does that'
    return f'{said}. The recipe has {recipe} images; the learning rate is {how}.'
