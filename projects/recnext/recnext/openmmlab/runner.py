"""MMEngine's Runner, which names a file that is at fault, records evaluations and reads no checkpoint twice."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.device import utils as mmengine_device
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch.utils.data import DataLoader, Dataset

from ..checkpoints.files import read_checkpoint
from ..checkpoints.releases import resolve_checkpoint
from ..utils.signals import outlive_stop_signals
from .checks import Start
from .compat import forward_log
from .guarded_pipeline import GuardedPipeline
from .hooks.algorithm_search import NoAlgorithmSearchHook
from .hooks.evaluation_record import EvaluationRecordHook
from .hooks.gather import GatherInWorkDirHook


class GuardedRunner(Runner):
    """mmengine's Runner, with a :class:`GuardedPipeline` in every dataset that it builds."""

    start: Start | None = None
    """The checkpoint that the config names in ``load_from``, if it has been read."""

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

        The file of :attr:`start` has been read already.
        """
        if self.start is not None and self.start.content is not None and filename == self.start.path:
            content = self.start.pop()
        else:
            content = read_checkpoint(resolve_checkpoint(filename), map_location, HistoryBuffer)
        if isinstance(content.get('meta'), dict):
            content['meta'].pop('config', None)  # Runner.resume would run it as a Python config
        self.call_hook('after_load_checkpoint', checkpoint=content)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        _load_checkpoint_to_model(model, content, strict, revise_keys=revise_keys)
        self._has_loaded = True
        self.logger.info(f'Load checkpoint from {filename}')
        return content


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    outlive_stop_signals()  # after PyTorch, which lets its workers end at a signal to the whole group
    if init is not None:
        init(worker)


def _innermost(dataset: Dataset) -> Iterator[BaseDataset]:
    """The datasets with a pipeline inside wrappers such as ConcatDataset, RepeatDataset and SeededDataset."""
    inside = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    for part in inside:
        if part is not None:
            yield from _innermost(part)
    if hasattr(dataset, 'pipeline') and hasattr(dataset, 'metainfo'):
        yield dataset


def build_runner(cfg: Config, start: Start | None = None) -> GuardedRunner:
    """The Runner of a config, with the hooks that every run here has.

    Args:
        cfg: Of the run.
        start: The checkpoint of ``cfg.load_from``, if it has been read; it is let go of when it is loaded.
    """
    if cfg.get('visualizer'):
        # mmengine would hand out that of an earlier run in this process, with its folders, if it has the same name.
        cfg.visualizer.pop('name', None)
    runner = GuardedRunner.from_cfg(cfg)
    forward_log()
    runner.start = start
    runner.register_hook(GatherInWorkDirHook())
    runner.register_hook(EvaluationRecordHook())
    runner.register_hook(NoAlgorithmSearchHook())
    return runner


@contextlib.contextmanager
def run_on(device: torch.device) -> Iterator[None]:
    """While a Runner is built and works: on this device.

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
