"""Training that can be stopped anywhere and resumed as if it had not been.

What iteration t computes depends on the seed, on t and on the weights, and on nothing else: not on the number of
workers, not on what was drawn before. So a resumed run needs no history. The sampler starts where the checkpoint ends
(mmengine reads all the batches once more and throws them away), each sample is augmented with random numbers of its
own, and so is each iteration's dropout.
"""

import random
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS, DATASETS, LOOPS
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import Dataset

from .errors import UserError


@DATA_SAMPLERS.register_module()
class ResumableSampler(InfiniteSampler):
    """mmengine's InfiniteSampler, the same order, that can start anywhere.

    Yields (place, index): the place of a sample in the order that all processes share, and its index in the dataset.
    """

    start = 0
    """How many samples of this process to skip; read when the iteration begins."""

    def __iter__(self) -> Iterator[tuple[int, int]]:
        places = range(self.rank + self.start * self.world_size, 2**62, self.world_size)
        yield from zip(places, islice(self._indices_of_rank(), self.start, None))


@DATASETS.register_module()
class SeededDataset(Dataset):
    """A dataset whose augmentation depends on nothing but a seed and the place of the sample in the order.

    Args:
        dataset: Config of the dataset inside, whose transforms draw from Python's, numpy's and torch's generators.
        seed: Of the run.
    """

    def __init__(self, dataset: dict, seed: int) -> None:
        self.dataset = DATASETS.build(dataset)
        self.seed = seed
        self.metainfo = self.dataset.metainfo

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, drawn: tuple[int, int]) -> dict:
        place, index = drawn
        seed_generators(self.seed, place, index)
        return self.dataset[index]


def seed_generators(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators from several numbers, so that other numbers give other streams."""
    words = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


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
