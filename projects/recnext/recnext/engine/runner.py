"""MMEngine's Runner, which names a file that is at fault and records evaluations."""

from collections.abc import Iterator

from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..datasets.guarded_pipeline import GuardedPipeline
from .hooks.evaluation_record import EvaluationRecordHook
from .hooks.gather import GatherInWorkDirHook


class GuardedRunner(Runner):
    """mmengine's Runner, with a :class:`GuardedPipeline` in every dataset that it builds."""

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args: object, **kwargs: object) -> DataLoader:
        """See :meth:`Runner.build_dataloader`."""
        loader = Runner.build_dataloader(dataloader, *args, **kwargs)
        for dataset in _innermost(loader.dataset):
            if isinstance(dataset.pipeline, Compose):
                dataset.pipeline = GuardedPipeline(dataset)
        return loader


def _innermost(dataset: object) -> Iterator[object]:
    """The datasets with a pipeline inside wrappers such as ConcatDataset, RepeatDataset and SeededDataset."""
    inside = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    for part in inside:
        if part is not None:
            yield from _innermost(part)
    if hasattr(dataset, 'pipeline') and hasattr(dataset, 'metainfo'):
        yield dataset


def build_runner(cfg: Config) -> GuardedRunner:
    """The Runner of a config, with the hooks that every run here has."""
    runner = GuardedRunner.from_cfg(cfg)
    runner.register_hook(GatherInWorkDirHook())
    runner.register_hook(EvaluationRecordHook())
    return runner
