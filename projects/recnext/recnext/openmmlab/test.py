"""Testing a checkpoint as a config says."""

import dataclasses
from dataclasses import dataclass

from mmengine.hooks import EMAHook

from ..runtimes.deployment import DEFAULT, Deployment
from ..utils.devices import AUTO, find_device
from ..utils.errors import UserError
from ..utils.files import make_folder
from .builder import build_on_meta
from .checks import adapt, read_start, set_data_root
from .config import (
    TRAINING_KEYS,
    add_hook,
    average_augmented,
    is_kind,
    is_segmentor,
    load_config,
    set_work_dir,
    show_pictures,
)
from .config_check import check_keys, named_mistakes
from .distributed import get_process_info, joined_processes
from .runner import build_runner, run_on


@dataclass
class TestOptions:
    """How :func:`test` tests, beside what the config says."""

    work_dir: str | None = None
    """Where logs go; ``work_dirs/<config>`` if None."""
    out: str | None = None
    """Folder for the label maps, as PNG in the numbering of the annotations."""
    show: bool = False
    """Open a window for each picture."""
    show_dir: str | None = None
    """Folder for pictures of image, ground truth and prediction."""
    wait_time: float = 2
    """Seconds that each window stays."""
    tta: bool = False
    """Average over the scales and flips of the config."""
    deployment: Deployment = DEFAULT
    """The form in which the network is run."""
    batch_size: int | None = None
    """Images in a batch; those of one size go through the network together."""
    overlap: bool = False
    """Start a batch before the last one is measured, see :class:`.OverlappedTestLoop`."""
    device: str = AUTO
    """See :func:`.find_device`; of several processes each takes one of a kind."""
    data_root: str | None = None
    """Folder of the dataset, in place of the config's."""
    cfg_options: dict | None = None
    """Merged into the config."""
    launcher: str = 'none'
    """``'pytorch'`` (torchrun), ``'slurm'`` or ``'none'``, which started the processes."""

    __test__ = False  # for pytest, which collects classes of such a name


def test(config: str, checkpoint: str, options: TestOptions = TestOptions()) -> dict[str, float]:
    """Evaluate a checkpoint; see ``recnext test --help``.

    Args:
        config: Path of the config.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        options: What the user wants beside them.

    Returns:
        The metrics, in per cent.

    Raises:
        UserError: what is missing or does not fit, before anything is written.
    """
    device = find_device(options.device, get_process_info(options.launcher).local_rank)
    cfg = load_config(config, options.cfg_options)
    check_keys(cfg)
    for key in ('test_dataloader', 'test_evaluator'):
        if not cfg.get(key):
            raise UserError(f'{config} has no {key}, and so nothing to test {"on" if "data" in key else "for"}.')
    if options.out and not is_segmentor(cfg):
        raise UserError('--out saves label maps, and a classifier makes none. --show-dir saves pictures.')
    cfg.launcher = options.launcher
    set_work_dir(cfg, config, options.work_dir)
    meta_model = build_on_meta(cfg.model)
    set_data_root(cfg, options.data_root, ('test',), meta_model.num_classes)
    start = read_start(checkpoint)
    adapt(start, meta_model)
    cfg.load_from = str(start.path)
    # Without a training set, too: mmseg's visualization hook would build it to learn the iteration.
    cfg.update(dict.fromkeys(TRAINING_KEYS))
    # Averaged weights stand in the checkpoint as the network's own; the hook would swap in what is not folded.
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or () if not is_kind(hook, EMAHook)]
    add_hook(cfg, 'DeployHook', **dataclasses.asdict(options.deployment))
    if options.batch_size:
        cfg.test_dataloader.batch_size = options.batch_size
    if options.overlap:
        cfg.test_cfg.type = 'OverlappedTestLoop'
        cfg.test_dataloader.pin_memory = device.type != 'cpu'
    if options.show or options.show_dir:
        show_pictures(cfg, options.show, options.show_dir, options.wait_time)
    if options.tta:
        average_augmented(cfg)
    if options.out:
        evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
        for evaluator in evaluators:
            evaluator.update(output_dir=options.out, keep_results=True)
    for folder in filter(None, (cfg.work_dir, options.out, options.show_dir)):
        make_folder(folder)
    with run_on(device), joined_processes(cfg, device), named_mistakes('', cfg):
        return build_runner(cfg, start).test()
