"""Configs: read, with the options of a command applied, and asked about their data."""

from importlib import import_module
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, init_default_scope
from mmseg.registry import DATASETS

from ..checkpoints.folder import DESCRIPTION, read_description
from ..checkpoints.releases import find_released_config
from ..utils.errors import UserError, name_missing_extra
from ..utils.paths import find_config, find_path
from .describe import config_of
from .listing import leaves

SPLITS = ('train', 'val', 'test')

PACKAGE = __package__.rpartition('.')[0]
MOVED = {'models.classifier': 'openmmlab.classifier', 'models.timm_models': 'timm'}
"""Modules that older configs import for what they register, and their names today."""

OLD_ROOMS = ('engine', 'models', 'datasets', 'visualization', 'evaluation')
"""Where others were; ``openmmlab`` registers all of them today."""

TRAINING_KEYS = ('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler')
"""What the Runner needs for training only; it takes either all of them or none."""


def load_config(path: str | Path, cfg_options: dict | None = None) -> Config:
    """Read a config file, or that of a release, and merge ``key=value`` options into it.

    Args:
        path: Of the file, or the name of one of the configs of this project or of a released segmentor; or a folder of
            a segmentor, whose description is read as data.
        cfg_options: Settings by their dotted names.

    Raises:
        UserError: no such file, or one that cannot be read, or options that do not fit in it.
    """
    if Path(path, DESCRIPTION).is_file():
        cfg = config_of(read_description(Path(path, DESCRIPTION)))
    else:
        path = find_released_config(str(path)) or find_config(path)
        try:
            cfg = Config.fromfile(path, import_custom_modules=False)
            import_custom_modules(cfg)
        except ModuleNotFoundError as error:
            if name_missing_extra(error):
                raise
            raise _unreadable(path, error) from None
        except Exception as error:  # a config is a program of the user's
            raise _unreadable(path, error) from None
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


def _unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError(f'{path} cannot be read: {type(error).__name__}: {error}')


def import_custom_modules(cfg: Config) -> None:
    """Import what a config names in ``custom_imports``, as mmengine does, with the modules of before under their names.

    ``cfg.custom_imports`` then has the names of today.

    Raises:
        ImportError: there is no such module, and ``allow_failed_imports`` is not set.
    """
    if not cfg.get('custom_imports'):
        return
    imports = cfg.custom_imports.imports
    names = [imports] if isinstance(imports, str) else imports
    cfg.custom_imports.imports = list(dict.fromkeys(map(_current_name, names)))
    for name in cfg.custom_imports.imports:
        try:
            import_module(name)
        except ImportError:
            if not cfg.custom_imports.get('allow_failed_imports'):
                raise


def _current_name(module: str) -> str:
    """Return where a module of this package that an older config names is registered from today."""
    inside = module.removeprefix(f'{PACKAGE}.')
    if module == PACKAGE or (inside != module and inside.partition('.')[0] in OLD_ROOMS):
        return f'{PACKAGE}.{MOVED.get(inside, "openmmlab")}'
    return module


def name_of(config: str | Path, cfg: Config) -> str:
    """What a config is called: as its file, or as the user called it; a folder from the hub by the name in it."""
    return Path(cfg.filename if Path(config).is_dir() else config).stem


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


def add_hook(cfg: Config, kind: str, **arguments: str | bool) -> None:
    """Add a hook to a config, in the place of one of its kind that the config may have for mmseg's own tools."""
    others = [hook for hook in cfg.get('custom_hooks') or () if hook['type'] != kind]
    cfg.custom_hooks = [*others, dict(type=kind, **arguments)]


def is_kind(hook: ConfigDict, kind: type[Hook]) -> bool:
    """Return whether a hook's config is of a kind, or of one that inherits from it; by its name or by its class."""
    of = hook.get('type')
    if isinstance(of, str):
        with HOOKS.switch_scope_and_registry(None) as registry:
            of = registry.get(of)
    return isinstance(of, type) and issubclass(of, kind)


def show_pictures(cfg: Config, show: bool, folder: str | None, wait_time: float) -> None:
    """Have a test draw every image, in a window or into a folder; in place.

    Args:
        cfg: Of the test.
        show: Open a window for each picture.
        folder: Where the pictures go; None means nowhere.
        wait_time: Seconds that each window stays.
    """
    segmentor = is_segmentor(cfg)
    kind, drawing = ('SegVisualizationHook', dict(draw=True)) if segmentor else ('VisualizationHook', dict(enable=True))
    hook = cfg.setdefault('default_hooks', ConfigDict()).get('visualization') or dict(type=kind)
    cfg.default_hooks.visualization = {**hook, **drawing, 'interval': 1, 'show': show, 'wait_time': wait_time}
    if folder and not segmentor:
        cfg.default_hooks.visualization.out_dir = folder
    elif folder:
        visualizer = cfg.get('visualizer') or dict(type='SegLocalVisualizer')
        if visualizer['type'] == 'SegLocalVisualizer':  # takes the same arguments, and shows the image as well
            visualizer = {**visualizer, 'type': 'SegPanelVisualizer'}
        place = 'picture_dir' if visualizer['type'] == 'SegPanelVisualizer' else 'save_dir'
        cfg.visualizer = {**visualizer, place: folder}


def average_augmented(cfg: Config) -> None:
    """Have a test average over the scales and flips of the config; in place.

    Raises:
        UserError: the config names none.
    """
    if not cfg.get('tta_pipeline'):
        raise UserError(
            'The config has no tta_pipeline, which --tta needs: a test pipeline with TestTimeAug '
            "(as in mmseg's configs/_base_/datasets/ade20k.py)."
        )
    for dataset in leaves(cfg.test_dataloader.dataset):
        dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**(cfg.get('tta_model') or dict(type='SegTTAModel')), module=cfg.model)


def set_work_dir(cfg: Config, config: str, work_dir: str | None) -> None:
    """Where to write: the option, else the config, else ``work_dirs/`` and the name of the config."""
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / name_of(config, cfg))


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
    """Names and colours (RGB) of the classes: stored with a segmentor, or of the test set, which need not be there."""
    if cfg.get('dataset_meta'):
        return list(cfg.dataset_meta['classes']), [list(colour) for colour in cfg.dataset_meta['palette']]
    init_default_scope('mmseg')
    metainfo = DATASETS.build({**test_set(cfg), 'pipeline': [], 'lazy_init': True}).metainfo
    return list(metainfo['classes']), [list(map(int, color)) for color in metainfo['palette']]
