"""Stop training at a signal, after the iteration, with a checkpoint to resume from."""

import os
from pathlib import Path

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from ..utils.signals import StopRequest
from .resume import list_checkpoints


class StoppedInEpoch(Exception):
    """Leaves a loop over epochs inside one; mmengine lets it end between them only."""


class StopAtSignalHook(Hook):
    """Stops training at the end of the iteration in which any of its processes was asked to stop.

    Iteration-based training writes a checkpoint of that iteration, unless there is one. Training by epochs cannot be
    resumed inside one, and leaves at once.

    Args:
        request: Whether this process was asked to.

    Raises:
        StoppedInEpoch: in training by epochs.
    """

    # After CheckpointHook, which may have written this iteration.
    priority = 'LOWEST'

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.stopped: str | None = None
        """Why training was stopped, and what it continues from."""
        self._parent = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None

    def _is_asked(self) -> bool:
        # A torchrun that has ended cannot ask any more; the next one is about to start.
        return self.request.received is not None or self._parent not in (None, os.getppid())

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Agree with the other processes whether this was the last iteration for now."""
        asked = torch.tensor(int(self._is_asked()))
        if runner.world_size > 1:
            all_reduce(asked, 'max')
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        if not asked or (not by_epoch and self.is_last_train_iter(runner)):
            return
        runner.train_loop.stop_training = True
        if not by_epoch:
            self._write_checkpoint(runner)
        written = [hook.last_ckpt for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        started_from = runner.cfg.get('load_from') if runner.cfg.get('resume') else None
        newest = next(filter(None, (*written, *list_checkpoints(runner.cfg), started_from)), None)
        then = f'continues from {newest}' if newest else 'starts from scratch (no checkpoint yet)'
        self.stopped = f'Stopped by a signal after iteration {runner.iter + 1}. Started with --resume, training {then}.'
        runner.logger.warning(self.stopped)
        if by_epoch:
            raise StoppedInEpoch

    def _write_checkpoint(self, runner: Runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and not hook.by_epoch:
                name = hook.filename_tmpl.format(runner.iter + 1)
                if hook.last_ckpt is None or Path(hook.last_ckpt).name != name:
                    hook._save_checkpoint(runner)
