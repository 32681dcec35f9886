"""Training that goes on where it was stopped, bit for bit; :mod:`datasets.seeded` has the samples for it."""

from collections.abc import Iterator

import torch
from mmengine.dist import get_rank
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator

from ..datasets.seeded import ResumableSampler, seed_generators
from ..utils.errors import UserError


@LOOPS.register_module()
class ResumableTrainLoop(IterBasedTrainLoop):
    """mmengine's iteration-based loop, resumed without reading old data, and bit-equal to a run that never stopped.

    Takes the arguments of :class:`IterBasedTrainLoop`.

    Raises:
        UserError: the sampler of the dataloader is not a :class:`ResumableSampler`.
    """

    def __init__(self, runner: object, dataloader: dict, **kwargs: object) -> None:
        sampler = dataloader['sampler']['type']
        if sampler not in ('ResumableSampler', ResumableSampler):
            raise UserError(
                f'ResumableTrainLoop needs train_dataloader.sampler.type=ResumableSampler; found {sampler}.'
            )
        seeded = dict(type='SeededDataset', dataset=dataloader['dataset'], seed=runner.seed)
        super().__init__(runner, {**dataloader, 'dataset': seeded}, **kwargs)

    def run(self) -> torch.nn.Module:
        """Train to the end; see :meth:`IterBasedTrainLoop.run`."""
        iteration = self._iter
        if iteration:
            sampler = self.dataloader.sampler
            sampler.start = iteration * self.dataloader.batch_size
            self.dataloader_iterator = _AlreadyThere(_InfiniteDataloaderIterator(self.dataloader), iteration)
        return super().run()

    def run_iter(self, data_batch: dict) -> None:
        seed_generators(self.runner.seed, self._iter, get_rank())
        super().run_iter(data_batch)


class _AlreadyThere:
    """Answers the batches that mmengine's loop asks for only to skip them; then the real ones."""

    def __init__(self, iterator: Iterator, skipped: int) -> None:
        self.iterator = iterator
        self.skipped = skipped

    def __next__(self) -> dict | None:
        if self.skipped:
            self.skipped -= 1
            return None
        return next(self.iterator)
