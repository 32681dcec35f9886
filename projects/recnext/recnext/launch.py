"""Training and testing behind the command lines: a config, checked, with the options applied, in MMEngine's Runner."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS

from .checkpoint import find_newest_checkpoint, read_checkpoint, remove_partial_files
from .config_check import check_fit, check_keys
from .conversion import ConversionError
from .dataset_check import check_before_run, leaves
from .dataset_guard import GuardedRunner
from .deployable import DeployableModel
from .distributed import GatherInWorkDirHook, find_place, joined_processes
from .engine import use_bfloat16
from .errors import UserError
from .evaluation_record import EvaluationRecordHook
from .models import build_skeleton
from .paths import find_path
from .pretrained import pretrained_files, read_pretrained
from .released import find_checkpoint, find_released_config
from .writing import make_folder

SPLITS = ('train', 'val', 'test')

TRAINING_KEYS = ('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler')
"""What the Runner needs for training only; it takes either all of them or none."""

TRAINING_STATE = ('optimizer', 'message_hub')
"""What a checkpoint holds beside the weights if training can go on from it."""


def load_config(path: str | Path, cfg_options: dict | None = None) -> Config:
    """Read a config file, or that of a release, and merge ``key=value`` options into it.

    Args:
        path: Of the file, or the name of a released segmentor.
        cfg_options: Settings by their dotted names.

    Raises:
        UserError: no such file, or one that cannot be read, or options that do not fit in it.
    """
    path = find_released_config(str(path)) or path
    if not Path(path).is_file():
        raise UserError(
            f'{path} is a folder; expected a config in it.' if Path(path).is_dir() else f'No such config: {path}'
        )
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program of the user's
        raise UserError(f'{path} cannot be read: {type(error).__name__}: {error}') from None
    try:
        cfg.merge_from_dict(cfg_options or {})
    except Exception as error:
        raise UserError(f'--cfg-options do not fit {path}: {type(error).__name__}: {error}') from None
    for split in SPLITS:
        loader = cfg.get(f'{split}_dataloader')
        if loader and not loader.get('num_workers'):
            # torch refuses the pair, and --cfg-options num_workers=0 should be enough.
            loader.persistent_workers = False
    return cfg


def is_segmentor(cfg: Config) -> bool:
    """Whether the model of a config is a segmentor; otherwise it is a classifier."""
    return 'decode_head' in cfg.get('model', {})


def load_segmentor_config(path: str | Path, cfg_options: dict | None = None) -> Config:
    """As :func:`load_config`, for what works with segmentors only.

    Raises:
        UserError: also for a config of another kind of model.
    """
    cfg = load_config(path, cfg_options)
    if not is_segmentor(cfg):
        raise UserError(
            f'{path} is no config of a segmentor: its model has no decode_head. This works with those only.'
        )
    return cfg


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
    together = find_place(launcher).world_size if cfg.get('sync_bn') and torch.cuda.is_available() else 1
    check_fit(cfg, is_segmentor(cfg), together)
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


def _build_runner(cfg: Config) -> GuardedRunner:
    runner = GuardedRunner.from_cfg(cfg)
    runner.register_hook(GatherInWorkDirHook())
    runner.register_hook(EvaluationRecordHook())
    return runner


def _run_training(cfg: Config) -> None:
    runner = _build_runner(cfg)
    runner.logger.info(describe_batch(cfg, runner.world_size))
    if cfg.optim_wrapper.type == 'AmpOptimWrapper' and cfg.optim_wrapper.get('dtype') in (None, 'float16'):
        runner.logger.warning('float16: the recursion of RecNeXt is known to overflow in it. --amp means bfloat16.')
    runner.train()


def choose_weights(cfg: Config, resume: str | None) -> None:
    """Decide what training starts from, and make sure that it is there and fits.

    Args:
        cfg: Of the run; changed in place.
        resume: See :func:`train`; the config's own ``resume`` counts where it is None.

    Raises:
        UserError: a file is missing, does not fit, or holds no training state to go on from.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    if resume == 'auto':
        # None where there is nothing to resume yet: a fresh start.
        resume = find_newest_checkpoint(cfg.work_dir)
    cfg.resume = resume is not None
    if cfg.resume:
        cfg.load_from = resume
    if not cfg.get('load_from'):
        check_pretrained(cfg)
        return
    cfg.load_from = str(find_checkpoint(cfg.load_from))
    checkpoint = check_checkpoint(cfg, cfg.load_from, other_classes=not cfg.resume)
    missing = [key for key in TRAINING_STATE if key not in checkpoint]
    if cfg.resume and missing:
        raise UserError(
            f'{cfg.load_from} holds weights, but no {" and no ".join(missing)} to go on from.\n'
            f'  To start a new run from these weights: --cfg-options load_from={cfg.load_from}'
        )
    # All weights come from there: no need for the ImageNet file.
    cfg.model.backbone.init_cfg = None
    if not cfg.resume:
        # The segmentor loads them itself, with another classifier if need be.
        cfg.model.init_cfg, cfg.load_from = dict(type='Pretrained', checkpoint=cfg.load_from), None


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


def test(
    config: str,
    checkpoint: str,
    work_dir: str | None = None,
    out: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2,
    tta: bool = False,
    fuse: str = 'all',
    precision: str = 'fp32',
    channels_last: bool = True,
    compile: bool = False,
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
        fuse: What to fold: ``'none'``, ``'norms'`` or ``'all'``; see :class:`engine.DeployHook`.
        precision: Of weights and activations: ``'fp32'``, ``'bf16'`` or ``'fp16'``.
        channels_last: Keep weights and activations in channels-last order.
        compile: Compile the network.
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
    add_hook(cfg, 'DeployHook', fuse=fuse, precision=precision, channels_last=channels_last, compile=compile)
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
        return _build_runner(cfg).test()


def add_hook(cfg: Config, kind: str, **arguments: object) -> None:
    """Add a hook to a config, in the place of one of its kind that the config may have for mmseg's own tools."""
    others = [hook for hook in cfg.get('custom_hooks', []) if hook['type'] != kind]
    cfg.custom_hooks = [*others, dict(type=kind, **arguments)]


def set_work_dir(cfg: Config, config: str, work_dir: str | None) -> None:
    """Where to write: the option, else the config, else ``work_dirs/`` and the name of the config."""
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(config).stem)


def set_data_root(cfg: Config, data_root: str | None, splits: Iterable[str]) -> None:
    """Point the datasets of ``splits`` at ``data_root``, or at where the config's own is found, and check them.

    Raises:
        UserError: there are no images, images without an annotation, or annotations for other classes.
    """
    num_classes = build_skeleton(cfg.model).num_classes
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in leaves(loader.dataset) if loader else ():
            point_at_data(dataset, data_root)
            check_before_run(dataset, split, num_classes, is_segmentor(cfg))


def point_at_data(dataset: ConfigDict, data_root: str | None) -> None:
    """Set a dataset's folder to ``data_root``, or to where the config's own is found."""
    dataset.data_root = str(data_root or find_path(dataset.get('data_root') or '.') or dataset.data_root)


def test_set(cfg: Config) -> ConfigDict:
    """The dataset of a config that is tested, the first one if there are several.

    Raises:
        UserError: there is none.
    """
    if not cfg.get('test_dataloader'):
        raise UserError('The config has no test_dataloader, whose pipeline says how images reach the network.')
    return next(leaves(cfg.test_dataloader.dataset))


def named_classes(cfg: Config) -> tuple[list[str], list[list[int]]]:
    """Names and colours (RGB) of the classes of the test set, which need not be there."""
    init_default_scope('mmseg')
    metainfo = DATASETS.build({**test_set(cfg), 'pipeline': [], 'lazy_init': True}).metainfo
    return list(metainfo['classes']), [list(map(int, color)) for color in metainfo['palette']]


def check_pretrained(cfg: Config) -> None:
    """Make sure that the weights to start from are there and fit, before anything is built or written.

    Raises:
        UserError: no such file, or one that does not fit.
    """
    backbone = build_skeleton(cfg.model).backbone
    for checkpoint in pretrained_files(backbone.init_cfg):
        read_pretrained(backbone, checkpoint)


def check_checkpoint(cfg: Config, checkpoint: str, other_classes: bool = False) -> dict:
    """Make sure that a checkpoint fits the network of a config, before anything is built or written.

    Args:
        cfg: Of the network.
        checkpoint: Path or address.
        other_classes: Whether it may be for another number of classes.

    Returns:
        What the file holds.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    content = read_checkpoint(find_checkpoint(checkpoint))
    model = build_skeleton(cfg.model)
    if not isinstance(model, DeployableModel):
        raise UserError(
            f'model.type is {type(model).__name__}, which would load weights that do not fit and only log it. '
            'Use FastEncoderDecoder, which refuses them and gives the same label maps, or RecNeXtClassifier.'
        )
    try:
        model.fit(content, other_classes)
    except ConversionError as error:
        raise ConversionError(f'{checkpoint}: {error}') from None
    return content
