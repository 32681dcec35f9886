"""Testing with two batches on the device at once, so that it has work while one of them is waited for."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from mmengine.runner import Runner, TestLoop, autocast

IN_FLIGHT = 2
"""Batches that are on the device at once."""


@LOOPS.register_module()
class OverlappedTestLoop(TestLoop):
    """mmengine's TestLoop with two threads for the network, each on a stream of its own; the same figures.

    Label maps and metrics ask the device for numbers and wait for them, and a device on which nothing else was started
    then waits as well. Here it has another batch to work on, while this thread measures, saves and draws the one
    before. Batches are copied to the device without waiting, if ``pin_memory`` is set in the dataloader.

    On a CPU, which has no use for it, it is the same loop without streams. Losses that a model returns beside its
    predictions are not logged.

    Takes the arguments of :class:`TestLoop`.
    """

    def __init__(self, runner: Runner, *args: object, **kwargs: object) -> None:
        super().__init__(runner, *args, **kwargs)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model = getattr(model, 'module', model)  # of test-time augmentation
        self.device = next(model.parameters()).device
        model.data_preprocessor._non_blocking = True

    def run(self) -> dict:
        """Test everything; the metrics."""
        runner = self.runner
        runner.call_hook('before_test')
        runner.call_hook('before_test_epoch')
        runner.model.eval()
        started: deque[tuple[int, dict, Future]] = deque()
        with ThreadPoolExecutor(IN_FLIGHT, initializer=self._take_stream) as workers:
            for index, batch in enumerate(self.dataloader):
                started.append((index, batch, workers.submit(self._predict, batch)))
                if len(started) > IN_FLIGHT:
                    self._measure(*started.popleft())
            while started:
                self._measure(*started.popleft())
        metrics = self.evaluator.evaluate(len(self.dataloader.dataset))
        runner.call_hook('after_test_epoch', metrics=metrics)
        runner.call_hook('after_test')
        return metrics

    def _take_stream(self) -> None:
        if self.device.type not in ('cpu', 'mps'):  # Apple's GPU has one stream
            torch.accelerator.set_stream(torch.Stream(self.device))

    @torch.no_grad()
    def _predict(self, batch: dict) -> list:
        with autocast(enabled=self.fp16):
            outputs = self.runner.model.test_step(batch)
        self._wait()
        return outputs

    @torch.no_grad()
    def _measure(self, index: int, batch: dict, prediction: Future) -> None:
        self.runner.call_hook('before_test_iter', batch_idx=index, data_batch=batch)
        outputs = prediction.result()
        self.evaluator.process(data_samples=outputs, data_batch=batch)
        self.runner.call_hook('after_test_iter', batch_idx=index, data_batch=batch, outputs=outputs)
        # The memory of these outputs is the other stream's, and taken again once nothing names them.
        self._wait()

    def _wait(self) -> None:
        """Until this thread's stream has done what it was asked."""
        if self.device.type != 'cpu':
            torch.accelerator.current_stream(self.device).synchronize()
