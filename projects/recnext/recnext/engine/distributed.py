"""Several processes, on GPUs with NCCL and without GPUs with gloo."""

import contextlib
import gc
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.dist import barrier
from torch import distributed

LONGEST_WAIT = timedelta(days=30)
"""That one process waits for another."""


@contextlib.contextmanager
def joined_processes(cfg: Config) -> Iterator[None]:
    """While a Runner of this config works: joined with the other processes, and parted from them in the end.

    Defect: mmengine leaves its processes joined. When the interpreter ends while a thread of gloo's still frees a
    tensor, for which it needs the interpreter, it is aborted (``terminate called without an active exception``; 4 of
    163 trainings here), and torchrun reports a run as failed that had finished.

    Repair: part, and let go of everything that holds the process group, which ends its threads and waits for them. So
    nothing made inside the context may be referenced by the time it is left.

    Args:
        cfg: See :func:`prepare_processes`.
    """
    prepare_processes(cfg)
    yield
    # After an error there is nobody to wait for: torchrun ends the others.
    if distributed.is_initialized():
        gc.collect()  # the Runner and its model refer to each other in circles
        barrier()
        distributed.destroy_process_group()


def prepare_processes(cfg: Config) -> None:
    """Let MMEngine's Runner work in several processes without a GPU; with one, or alone, there is nothing to do.

    Defects: mmengine calls ``torch.cuda.set_device`` before it joins the others, hands a GPU's number to
    DistributedDataParallel, and SyncBatchNorm refuses to train on a CPU.

    Repair: join through gloo before the Runner would, name no device, and keep plain BatchNorm.

    Args:
        cfg: Of the run; ``launcher`` must be set. Changed in place.
    """
    if cfg.launcher == 'none' or torch.cuda.is_available():
        return
    if cfg.launcher == 'slurm':
        _name_slurm_process()
    distributed.init_process_group(backend='gloo')
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    cfg.sync_bn = None


def _name_slurm_process() -> None:
    """Say in torchrun's words what Slurm says in its own, as mmengine does where there are GPUs."""
    words = dict(RANK='SLURM_PROCID', LOCAL_RANK='SLURM_LOCALID', WORLD_SIZE='SLURM_NTASKS')
    os.environ.update({ours: os.environ[theirs] for ours, theirs in words.items()})
    os.environ.setdefault('MASTER_ADDR', os.environ.get('SLURM_LAUNCH_NODE_IPADDR', '127.0.0.1'))
    os.environ.setdefault('MASTER_PORT', '29500')


class ProcessInfo(NamedTuple):
    """Which of several processes this one is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def get_process_info(launcher: str) -> ProcessInfo:
    """This process among those that work on one task side by side, without ever joining.

    Args:
        launcher: What started them: ``'none'``, ``'pytorch'`` (torchrun, or what sets its variables) or ``'slurm'``.
    """
    if launcher == 'none':
        return ProcessInfo()
    if launcher == 'slurm':
        _name_slurm_process()
    return ProcessInfo(*(int(os.environ[name]) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')))


def wait_for_others(launcher: str) -> None:
    """Meet the other processes that have worked side by side, and part again.

    A process that reports a failure to torchrun ends the others, so it must do so last. Alone, or in an array of jobs
    that name no address to meet at, there is nothing to wait for.
    """
    if launcher != 'none' and 'MASTER_ADDR' in os.environ:
        distributed.init_process_group('gloo', timeout=LONGEST_WAIT)
        distributed.barrier()
        distributed.destroy_process_group()
