"""Training and testing behind the command lines: a config, checked, with the options applied, in MMEngine's Runner."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner, find_latest_checkpoint

from .checkpoint import read_checkpoint
from .conversion import ConversionError
from .errors import UserError
from .models import build_skeleton
from .paths import find_path
from .pretrained import pretrained_files, read_pretrained

SPLITS = ('train', 'val', 'test')

HARMLESS = (
    '``build_loss`` would be deprecated soon',  # mmseg's own heads call it
    'Default ``avg_non_ignore`` is False',  # as in the released recipe
    'The draw is False',  # no pictures were asked for
)
"""Warnings of the stack that a user of these configs can do nothing about."""

TRAINING_KEYS = ('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler')
"""What the Runner needs for training only; it takes either all of them or none."""


def load_config(path: str | Path, cfg_options: dict | None = None) -> Config:
    """Read a config file and merge ``key=value`` options into it.

    Raises:
        UserError: no such file, or one that cannot be read.
    """
    if not Path(path).is_file():
        raise UserError(f'No such config: {path}')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is a program of the user's
        raise UserError(f'{path} cannot be read: {type(error).__name__}: {error}') from None
    if cfg_options:
        cfg.merge_from_dict(cfg_options)
    for split in SPLITS:
        loader = cfg.get(f'{split}_dataloader')
        if loader and not loader.get('num_workers'):
            # torch refuses the pair, and --cfg-options num_workers=0 should be enough.
            loader.persistent_workers = False
    for message in HARMLESS:
        warnings.filterwarnings('ignore', message=message)
    return cfg


def train(
    config: str,
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    data_root: str | None = None,
    cfg_options: dict | None = None,
) -> None:
    """Train as the config says; see ``python tools/train.py --help``.

    Args:
        config: Path of the config.
        work_dir: Where logs and checkpoints go; ``work_dirs/<config>`` if None.
        resume: ``'auto'`` for the newest checkpoint of ``work_dir``, or the path of one.
        amp: Mixed precision in bfloat16.
        data_root: Of the dataset, in place of the config's.
        cfg_options: Merged into the config.

    Raises:
        UserError: what is missing or does not fit, before the first iteration.
    """
    cfg = load_config(config, cfg_options)
    set_work_dir(cfg, config, work_dir)
    set_data_root(cfg, data_root, ('train', 'val'))
    if amp:
        cfg.optim_wrapper.type = 'Bfloat16OptimWrapper'
    if resume is not None:
        cfg.resume = True
        cfg.load_from = find_latest_checkpoint(cfg.work_dir) if resume == 'auto' else resume
    if cfg.get('load_from'):
        check_checkpoint(cfg, cfg.load_from)
        # All weights come from there: no need for the ImageNet file.
        cfg.model.backbone.init_cfg = None
    check_pretrained(cfg)
    Runner.from_cfg(cfg).train()


def test(
    config: str,
    checkpoint: str,
    work_dir: str | None = None,
    out: str | None = None,
    show: bool = False,
    show_dir: str | None = None,
    wait_time: float = 2,
    tta: bool = False,
    data_root: str | None = None,
    cfg_options: dict | None = None,
) -> dict[str, float]:
    """Evaluate a checkpoint; see ``python tools/test.py --help``.

    Args:
        config: Path of the config.
        checkpoint: Path of the weights, of mmseg 1.x or 0.x.
        work_dir: Where logs go; ``work_dirs/<config>`` if None.
        out: Folder for the label maps, as PNG in the numbering of the annotations.
        show: Open a window for each picture.
        show_dir: Folder for pictures of image, truth and prediction.
        wait_time: Seconds that each window stays.
        tta: Average over scales and flips.
        data_root: Of the dataset, in place of the config's.
        cfg_options: Merged into the config.

    Returns:
        The metrics, in per cent.

    Raises:
        UserError: what is missing or does not fit, before anything is written.
    """
    cfg = load_config(config, cfg_options)
    set_work_dir(cfg, config, work_dir)
    set_data_root(cfg, data_root, ('test',))
    check_checkpoint(cfg, checkpoint)
    cfg.load_from = checkpoint
    # Without a training set, too: mmseg's visualization hook would build it to learn the iteration.
    cfg.update(dict.fromkeys(TRAINING_KEYS))
    if show or show_dir:
        cfg.default_hooks.visualization.update(draw=True, interval=1, show=show, wait_time=wait_time)
    if show_dir:
        cfg.visualizer.picture_dir = show_dir
    if tta:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    if out:
        cfg.test_evaluator.update(output_dir=out, keep_results=True)
    return Runner.from_cfg(cfg).test()


def set_work_dir(cfg: Config, config: str, work_dir: str | None) -> None:
    """Where to write: the option, else the config, else ``work_dirs/`` and the name of the config."""
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(config).stem)


def set_data_root(cfg: Config, data_root: str | None, splits: Iterable[str]) -> None:
    """Point the datasets of ``splits`` at ``data_root``, or at where the config's own is found, and check them.

    Raises:
        UserError: a folder is missing or holds nothing.
    """
    for split in splits:
        for dataset in _leaves(cfg[f'{split}_dataloader'].dataset):
            root = Path(data_root or find_path(dataset.data_root) or dataset.data_root)
            for folder in filter(None, dataset.data_prefix.values()):
                place = root / folder
                if not place.is_dir() or not any(place.iterdir()):
                    raise UserError(
                        f'The {split} set is not where the config looks for it: {place} '
                        f'{"is empty" if place.is_dir() else "does not exist"}.\n'
                        '  Name the folder that holds images/ and annotations/ with --data-root.'
                    )
            dataset.data_root = str(root)


def _leaves(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The datasets inside wrappers such as RepeatDataset and ConcatDataset."""
    inside = dataset.get('datasets') or ([dataset.dataset] if 'dataset' in dataset else [])
    for part in inside:
        yield from _leaves(part)
    if not inside:
        yield dataset


def check_pretrained(cfg: Config) -> None:
    """Make sure that the weights to start from are there and fit, before anything is built or written.

    Raises:
        UserError: no such file, or one that does not fit.
    """
    backbone = build_skeleton(cfg.model).backbone
    for checkpoint in pretrained_files(backbone.init_cfg):
        read_pretrained(backbone, checkpoint)


def check_checkpoint(cfg: Config, checkpoint: str) -> None:
    """Make sure that a checkpoint fits the network of a config, before anything is built or written.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    weights = read_checkpoint(checkpoint)
    try:
        build_skeleton(cfg.model).fit(weights)
    except ConversionError as error:
        raise ConversionError(f'{checkpoint}: {error}') from None
