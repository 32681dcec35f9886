"""Testing that starts the next batch on the device before it measures the one before, so that the device has work."""

import contextlib
from collections.abc import Iterator

import torch
from mmengine.model import is_model_wrapper
from mmengine.registry import LOOPS
from mmengine.runner import Runner, TestLoop, autocast


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
