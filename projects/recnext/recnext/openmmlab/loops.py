"""What an iteration does: training that resumes bit for bit, in bfloat16; testing that keeps a GPU busy.

:mod:`.seeded` has the samples for the training loop.
"""

import contextlib
from collections.abc import Iterator

import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import LOOPS, OPTIM_WRAPPERS
from mmengine.runner import IterBasedTrainLoop, Runner, TestLoop, autocast
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch import nn

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


@OPTIM_WRAPPERS.register_module()
class Bfloat16OptimWrapper(OptimWrapper):
    """Run forward passes in bfloat16 where autocast finds that safe; weights and updates stay in float32.

    mmengine's AmpOptimWrapper refuses to work on a CPU, its autocast on all but three kinds of device, and its loss
    scale is of no use here: bfloat16 has the range of float32. float16 does not, and the recursion of RecNeXt is known
    to overflow in it.
    """

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device
        with super().optim_context(model), torch.autocast(device.type, torch.bfloat16):
            yield


def use_bfloat16(cfg: Config) -> None:
    """Set a config to train in mixed precision; in place."""
    kept = {key: cfg.optim_wrapper[key] for key in cfg.optim_wrapper if key not in ('dtype', 'loss_scale')}
    cfg.optim_wrapper = dict(kept, type='Bfloat16OptimWrapper')


@LOOPS.register_module()
class OverlappedTestLoop(TestLoop):
    """mmengine's TestLoop, which measures a batch when the next one has been started; the same figures.

    Metrics, files and pictures ask the device for numbers and wait for them, and a device on which nothing else was
    started then waits as well. Here it has another batch to work on. What measures has a stream of its own, or it would
    wait for that batch too. Batches are copied to the device without waiting, if ``pin_memory`` is set in the
    dataloader.

    On a CPU, which has no use for it, it is the same loop one batch late. Losses that a model returns beside its
    predictions are not logged.

    Takes the arguments of :class:`TestLoop`.
    """

    def __init__(self, runner: Runner, *args: object, **kwargs: object) -> None:
        super().__init__(runner, *args, **kwargs)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model = getattr(model, 'module', model)  # of test-time augmentation
        self.device = next(model.parameters()).device
        # Apple's GPU has one stream.
        self.stream = torch.Stream(self.device) if self.device.type not in ('cpu', 'mps') else None
        model.data_preprocessor._non_blocking = True

    @torch.no_grad()
    def run(self) -> dict:
        """Test everything; the metrics."""
        runner = self.runner
        runner.call_hook('before_test')
        runner.call_hook('before_test_epoch')
        runner.model.eval()
        started = None
        for index, batch in enumerate(self.dataloader):
            with autocast(enabled=self.fp16):
                outputs = runner.model.test_step(batch)
            done = torch.accelerator.current_stream(self.device).record_event() if self.stream else None
            if started:
                self._measure(*started)
            started = index, batch, outputs, done
        if started:
            self._measure(*started)
        metrics = self.evaluator.evaluate(len(self.dataloader.dataset))
        runner.call_hook('after_test_epoch', metrics=metrics)
        runner.call_hook('after_test')
        return metrics

    def _measure(self, index: int, batch: dict, outputs: list, done: torch.Event | None) -> None:
        with self._on_own_stream(done):
            self.runner.call_hook('before_test_iter', batch_idx=index, data_batch=batch)
            self.evaluator.process(data_samples=outputs, data_batch=batch)
            self.runner.call_hook('after_test_iter', batch_idx=index, data_batch=batch, outputs=outputs)

    @contextlib.contextmanager
    def _on_own_stream(self, done: torch.Event | None) -> Iterator[None]:
        if done is None:
            yield
            return
        before = torch.accelerator.current_stream(self.device)
        torch.accelerator.set_stream(self.stream)
        try:
            self.stream.wait_event(done)
            yield
            # The memory of the outputs is the other stream's, and taken again once nothing names them.
            self.stream.synchronize()
        finally:
            torch.accelerator.set_stream(before)
