"""A run whose loss is no number any more ends there, before it goes on to write checkpoints that are worth nothing."""

import math
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ...checkpoints.files import CheckpointError, numbered_checkpoints, read_checkpoint
from ...utils.errors import UserError

MAX_IMAGES_NAMED = 8
"""Images that the message names."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stops training in the iteration in which a loss is not finite.

    It costs no time: mmengine's RuntimeInfoHook waits for the losses of every iteration anyway.

    Raises:
        UserError: with the iteration, the losses, the images and the last good checkpoint.
    """

    # Before LoggerHook and CheckpointHook: nothing of this iteration is written.
    priority = 'NORMAL'

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: dict, outputs: dict | None = None) -> None:
        """Look at the losses of one iteration; mmengine counts it from 0, the logs from 1."""
        losses = {name: value.item() for name, value in (outputs or {}).items() if 'loss' in name}
        if all(map(math.isfinite, losses.values())):
            return
        paths = [sample.metainfo.get('img_path', 'unnamed') for sample in data_batch['data_samples']]
        more = f'\n  and {len(paths) - MAX_IMAGES_NAMED} more' if len(paths) > MAX_IMAGES_NAMED else ''
        process = f' of process {get_rank() + 1}' if runner.world_size > 1 else ''
        raise UserError(
            f'Training stopped in iteration {runner.iter + 1}: '
            + ', '.join(f'{name} is {value}' for name, value in losses.items() if not math.isfinite(value))
            + f'. The images{process}:\n  '
            + '\n  '.join(map(str, paths[:MAX_IMAGES_NAMED]))
            + more
            + f'\n{_advice(runner.work_dir, runner.iter)}'
        )


def _advice(work_dir: str, iteration: int) -> str:
    smaller = 'with a smaller learning rate: --cfg-options optim_wrapper.optimizer.lr=...'
    start = last_good_checkpoint(work_dir, iteration)
    if start is None:
        return f'There is no good checkpoint in {work_dir} yet. Start again {smaller}'
    return f'The last good checkpoint is {start}.\n  Start from its weights {smaller} load_from={start}'


def last_good_checkpoint(folder: str | Path, iteration: int) -> Path | None:
    """The newest numbered checkpoint of a work dir that was written before some iteration and is finite.

    Args:
        folder: The work dir.
        iteration: How many iterations had been completed when the loss was not finite. A checkpoint of just as many
            holds the weights that gave this loss, and is not good.
    """
    for path in numbered_checkpoints(folder):
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError:
            continue
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in checkpoint['state_dict'].values())
        if finite and checkpoint['meta']['iter'] < iteration:
            return path
    return None
