"""MMEngine's Runner, which names a file or a setting that is at fault, and gets nothing of a checkpoint to run."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.device import utils as mmengine_device
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from ..checkpoints.files import read_checkpoint
from ..checkpoints.releases import resolve_checkpoint
from ..utils.signals import outlive_stop_signals
from .builder import quiet_mmseg
from .checks import Start
from .compat import forward_log
from .config_check import named_mistakes
from .guarded_pipeline import GuardedPipeline
from .hooks import EvaluationRecordHook, GatherInWorkDirHook, NoAlgorithmSearchHook, unwrap
from .pretrained import log_loaded
from .resume import only_data


class GuardedRunner(Runner):
    """mmengine's Runner, with a :class:`GuardedPipeline` in every dataset that it builds."""

    start: Start | None = None
    """The checkpoint that the config names in ``load_from``, if a check has read it."""

    def build_optim_wrapper(self, optim_wrapper: Optimizer | OptimWrapper | dict) -> OptimWrapper | OptimWrapperDict:
        """See :meth:`Runner.build_optim_wrapper`."""
        with named_mistakes('optim_wrapper', optim_wrapper):
            return super().build_optim_wrapper(optim_wrapper)

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args: object, **kwargs: object) -> DataLoader:
        """See :meth:`Runner.build_dataloader`."""
        loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)
        for dataset in _innermost(loader.dataset):
            if isinstance(dataset.pipeline, Compose):
                dataset.pipeline = GuardedPipeline(dataset)
        return loader

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: list[tuple[str, str]] = [(r'^module.', '')],
    ) -> dict:
        """Load a checkpoint, of which nothing is run: neither what is pickled in it nor the text of a config.

        The file of :attr:`start` has been read, checked and adapted already.
        """
        model, start = unwrap(self.model), self.start
        if start is not None and start.content and filename == str(start.path):
            content, checked = start.pop(), True
            if start.other_classes:
                own, found = model.state_dict(), content['state_dict']
                log_loaded(model.kind.capitalize(), start.path, found, sorted(own.keys() - found.keys()))
                content['state_dict'] = {**own, **found}
        else:
            content, checked = read_checkpoint(resolve_checkpoint(filename), map_location, HistoryBuffer), False
        content = only_data(content, self.cfg)
        self.call_hook('after_load_checkpoint', checkpoint=content)
        if checked and 'ema_state_dict' not in content:  # which EMAHook loads, and nothing has checked
            model.load_checked(content['state_dict'])
        else:
            _load_checkpoint_to_model(model, content, strict, revise_keys=revise_keys)
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return content


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    outlive_stop_signals()  # after PyTorch, which lets its workers end at a signal to the whole group
    if init is not None:
        init(worker)


def _innermost(dataset: Dataset) -> Iterator[BaseDataset]:
    """Yield the datasets with a pipeline inside wrappers such as ConcatDataset, RepeatDataset and SeededDataset."""
    inside = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    for part in inside:
        if part is not None:
            yield from _innermost(part)
    if hasattr(dataset, 'pipeline') and hasattr(dataset, 'metainfo'):
        yield dataset


def build_runner(cfg: Config, start: Start | None = None) -> GuardedRunner:
    """Build the Runner of a config, with the hooks that every run here has.

    Args:
        cfg: Of the run.
        start: What the run begins with, if a check has read it; it is let go of when it is loaded.
    """
    if cfg.get('visualizer'):
        # mmengine would hand out that of an earlier run in this process, with its folders, if it has the same name.
        cfg.visualizer.pop('name', None)
    with named_mistakes('', cfg), quiet_mmseg():
        runner = GuardedRunner.from_cfg(cfg)
    forward_log()
    for hook in (GatherInWorkDirHook(), EvaluationRecordHook(), NoAlgorithmSearchHook()):
        runner.register_hook(hook)
    if start is not None:
        runner.start = start
        if start.backbone:
            unwrap(runner.model).backbone.read_before, start.backbone = start.backbone, None
        for note in start.notes:
            runner.logger.warning(note)
    return runner


@contextlib.contextmanager
def run_on(device: torch.device) -> Iterator[None]:
    """Make mmengine build and run everything on a device inside this context.

    Defect: mmengine takes the first kind of device that it knows and finds, at import, and asks nobody.

    Repair: what it found is replaced; the Runner, autocast and whatever else of mmengine asks is told the kind of this
    device, and the kind's current device is this one.
    """
    found, mmengine_device.DEVICE = mmengine_device.DEVICE, device.type
    if device.index is not None and torch.accelerator.device_count() > 1:  # Apple's is always the one
        torch.get_device_module(device).set_device(device.index)
    try:
        yield
    finally:
        mmengine_device.DEVICE = found
