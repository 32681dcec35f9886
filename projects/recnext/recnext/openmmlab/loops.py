"""Training that goes on where it was stopped, bit for bit; :mod:`datasets.seeded` has the samples for it."""

import torch
from mmengine.dist import get_rank
from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.runner.loops import _InfiniteDataloaderIterator

from ..utils.errors import UserError
from .seeded import ResumableSampler, seed_generators

SAMPLES = 'samples_drawn'
"""What a checkpoint calls the number of samples that all processes have trained on, in its message hub."""


@LOOPS.register_module()
class ResumableTrainLoop(IterBasedTrainLoop):
    """mmengine's iteration-based loop, resumed without reading old data, and bit-equal to a run that never stopped.

    With another number of processes, or of images in a batch, it goes on with the sample that would have come next.

    Takes the arguments of :class:`IterBasedTrainLoop`.

    Raises:
        UserError: the sampler of the dataloader is not a :class:`ResumableSampler`.
    """

    def __init__(self, runner: Runner, dataloader: dict, **kwargs: object) -> None:
        sampler = dataloader['sampler']['type']
        if sampler not in ('ResumableSampler', ResumableSampler):
            raise UserError(
                f'ResumableTrainLoop needs train_dataloader.sampler.type=ResumableSampler; found {sampler}.'
            )
        seeded = dict(type='SeededDataset', dataset=dataloader['dataset'], seed=runner.seed)
        super().__init__(runner, {**dataloader, 'dataset': seeded}, **kwargs)

    @property
    def _samples_an_iteration(self) -> int:
        return self.dataloader.batch_size * self.runner.world_size

    @property
    def _samples_drawn(self) -> int:
        # A checkpoint that does not say was written by as many processes, or nobody can know.
        return self.runner.message_hub.get_info(SAMPLES, self._iter * self._samples_an_iteration)

    def run(self) -> torch.nn.Module:
        """Train to the end, as :meth:`IterBasedTrainLoop.run` does, but starting the data where they are needed."""
        runner = self.runner
        runner.call_hook('before_train')
        runner.call_hook('before_train_epoch')
        if self._iter:
            self.dataloader.sampler.start = self._samples_drawn
            self.dataloader_iterator = _InfiniteDataloaderIterator(self.dataloader)
        while self._iter < self._max_iters and not self.stop_training:
            runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            self._decide_current_val_interval()
            due = self._iter % self.val_interval == 0 or self._iter == self._max_iters
            if runner.val_loop is not None and self._iter >= self.val_begin and due and not self.stop_training:
                runner.val_loop.run()
        runner.call_hook('after_train_epoch')
        runner.call_hook('after_train')
        return runner.model

    def run_iter(self, data_batch: dict) -> None:
        """Train on one batch; what is random about it depends on the iteration alone."""
        seed_generators(self.runner.seed, self._iter, get_rank())
        self.runner.message_hub.update_info(SAMPLES, self._samples_drawn + self._samples_an_iteration)
        super().run_iter(data_batch)
