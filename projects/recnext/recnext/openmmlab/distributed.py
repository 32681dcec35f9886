"""Several processes: with NCCL on GPUs of NVIDIA's, with gloo on CPUs, and with what PyTorch has for other kinds."""

import contextlib
import gc
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, barrier
from torch import distributed

from ..utils.errors import PassingError, UserError

LONGEST_WAIT = timedelta(days=30)
"""That one process waits for another."""


@contextlib.contextmanager
def joined_processes(cfg: Config, device: torch.device) -> Iterator[None]:
    """While a Runner of this config works: joined with the other processes, and parted from them in the end.

    Defect: mmengine leaves its processes joined. When the interpreter ends while a thread of gloo's still frees a
    tensor, for which it needs the interpreter, it is aborted (``terminate called without an active exception``; 4 of
    163 trainings here), and torchrun reports a run as failed that had finished.

    Repair: part, and let go of everything that holds the process group, which ends its threads and waits for them. So
    nothing made inside the context may be referenced by the time it is left.

    Args:
        cfg: See :func:`prepare_processes`.
        device: Likewise.
    """
    prepare_processes(cfg, device)
    yield
    # After an error there is nobody to wait for: torchrun ends the others.
    if distributed.is_initialized():
        gc.collect()  # the Runner and its model refer to each other in circles
        barrier()
        distributed.destroy_process_group()


def check_same_start(iteration: int | None) -> None:
    """Make sure that all processes go on from the same checkpoint.

    Args:
        iteration: Of that of this process; None at a fresh start.

    Raises:
        PassingError: they do not; a shared file system may be late.
    """
    starts = all_gather_object(iteration)
    if len(set(starts)) > 1:
        said = ', '.join('none' if start is None else str(start) for start in starts)
        raise PassingError(
            f'The processes would go on from checkpoints of different iterations: {said}. All machines must see the '
            'same work dir, or the same --store.'
        )


def prepare_processes(cfg: Config, device: torch.device) -> None:
    """Let MMEngine's Runner work in several processes on any device; on NVIDIA's, or alone, there is nothing to do.

    Defects: mmengine calls ``torch.cuda.set_device`` before it joins the others, hands a GPU's number to
    DistributedDataParallel, and SyncBatchNorm refuses to train on a CPU.

    Repair: join before the Runner would, through what PyTorch has for the device, name no device, and keep plain
    BatchNorm where the other cannot be.

    Args:
        cfg: Of the run; ``launcher`` must be set. Changed in place.
        device: That this process works on.

    Raises:
        UserError: the device is not the one that mmengine would give to this process.
    """
    if cfg.launcher == 'none':
        return
    process = get_process_info(cfg.launcher).local_rank
    if device.index not in (None, process):
        raise UserError(
            f'Process {process} of this machine would work on {device}, and of several processes each has the device '
            f'of its number: expected --device {device.type}, and at least as many devices as processes.'
        )
    if device.type == 'cuda':
        return
    distributed.init_process_group(backend_of(device))
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    if not can_sync_norms(device):
        cfg.sync_bn = None


def backend_of(device: torch.device) -> str:
    """What processes talk through: about tensors of a device, and where that is an accelerator of the CPU too."""
    backends = distributed.Backend.default_device_backend_map
    own = backends.get(device.type, 'gloo')
    return own if own in ('gloo', 'nccl') else f'cpu:gloo,{device.type}:{own}'


def can_sync_norms(device: torch.device) -> bool:
    """Whether SyncBatchNorm works on a device: PyTorch has it for those whose processes do not talk through gloo."""
    return backend_of(device) != 'gloo'


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
