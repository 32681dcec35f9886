"""Training that can be stopped anywhere and resumed as if it had not been.

What iteration t computes depends on the seed, on t and on the weights, and on nothing else: not on the number of
workers, not on what was drawn before. So a resumed run needs no history. The sampler starts where the checkpoint ends
(mmengine reads all the batches once more and throws them away), each sample is augmented with random numbers of its
own, and so is each iteration's dropout. The order of the samples is one for all processes together, so that training
can go on with another number of them.
"""

import random
from collections.abc import Iterator, Sized
from itertools import islice

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch.utils.data import Dataset

from ..utils.errors import UserError


@DATA_SAMPLERS.register_module()
class ResumableSampler(InfiniteSampler):
    """mmengine's InfiniteSampler, the same order, that can start anywhere.

    Yields (place, index): the place of a sample in the order that all processes share, and its index in the dataset.

    Raises:
        UserError: the dataset takes no such pairs, since the loop is not :class:`.ResumableTrainLoop`.
    """

    start = 0
    """How many samples of the order, of all processes together, to skip; read when the iteration begins."""

    def __init__(self, dataset: Sized, **kwargs: object) -> None:
        if hasattr(dataset, 'metainfo') and not isinstance(dataset, SeededDataset):
            raise UserError('ResumableSampler needs train_cfg.type=ResumableTrainLoop, or take InfiniteSampler.')
        super().__init__(dataset, **kwargs)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        first = self.start + self.rank
        places = range(first, 2**62, self.world_size)
        yield from zip(places, islice(self._infinite_indices(), first, None, self.world_size))


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
