"""Several processes: NCCL on NVIDIA's GPUs, gloo on CPUs, and what PyTorch has for other kinds of device."""

import contextlib
import gc
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, barrier
from torch import distributed

from ..utils.errors import UserError


class ProcessInfo(NamedTuple):
    """Position of a process among all of them and on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def get_process_info(launcher: str) -> ProcessInfo:
    """Return the position of this process, which need not have joined the others.

    Args:
        launcher: What started the processes: ``'none'``, ``'pytorch'`` (torchrun, or what sets its variables) or
            ``'slurm'``, whose variables are then set as torchrun's, too.

    Raises:
        UserError: this process was not started so, or Slurm does not tell the first node of the job.
    """
    if launcher == 'none':
        return ProcessInfo()
    try:
        if launcher == 'slurm':
            _set_torchrun_variables()
        return ProcessInfo(*(int(os.environ[name]) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')))
    except KeyError as error:
        by = 'srun (tools/slurm_*.sh)' if launcher == 'slurm' else 'torchrun (tools/dist_*.sh)'
        raise UserError(f'--launcher {launcher} is for processes that {by} starts: {error} is not set.') from None


def _set_torchrun_variables() -> None:
    """Set what mmengine sets under Slurm, by the same rule; it would do so on NVIDIA's GPUs alone."""
    names = dict(RANK='SLURM_PROCID', LOCAL_RANK='SLURM_LOCALID', WORLD_SIZE='SLURM_NTASKS')
    os.environ.update({ours: os.environ[theirs] for ours, theirs in names.items()})
    os.environ.setdefault('MASTER_PORT', '29500')
    if not os.environ.get('MASTER_ADDR'):
        os.environ['MASTER_ADDR'] = _first_node(os.environ['SLURM_NODELIST'])


def _first_node(nodes: str) -> str:
    try:
        return subprocess.check_output(['scontrol', 'show', 'hostnames', nodes], text=True).split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f'Slurm does not tell the first node of {nodes}: scontrol show hostnames: {error}.\n'
            '  Set MASTER_ADDR to its name.'
        ) from None


@contextlib.contextmanager
def joined_processes(cfg: Config, device: torch.device) -> Iterator[None]:
    """Join the other processes while a Runner of this config works, and leave them afterwards.

    Defect: mmengine never leaves the process group. If the interpreter ends while a thread of gloo still frees a
    tensor, for which it needs the interpreter, it is aborted (``terminate called without an active exception``; 4 of
    163 trainings), and torchrun reports a finished run as failed.

    Repair: leave it, after everything that refers to it is gone, which ends its threads and waits for them. So nothing
    made inside the context may be referenced when it is left.

    Args:
        cfg: See :func:`prepare_processes`.
        device: Likewise.
    """
    prepare_processes(cfg, device)
    yield
    # After an error there is nobody to wait for: the launcher ends the others.
    if distributed.is_initialized():
        gc.collect()  # the Runner and its model refer to each other in circles
        barrier()
        distributed.destroy_process_group()


def prepare_processes(cfg: Config, device: torch.device) -> None:
    """Let mmengine's Runner work in several processes on any device; on NVIDIA's, or alone, there is nothing to do.

    Defects: mmengine calls ``torch.cuda.set_device`` before it joins the others, hands a GPU's number to
    DistributedDataParallel, and SyncBatchNorm refuses to train on a CPU.

    Repair: join before the Runner would, through what PyTorch has for the device, name no device, and keep plain
    BatchNorm where the other cannot be.

    Args:
        cfg: Config of the run; ``launcher`` must be set. Changed in place.
        device: Device that this process works on.

    Raises:
        UserError: there is no device of its own for this process, or it is not the one that mmengine would take.
    """
    if cfg.launcher == 'none':
        return
    local_rank = get_process_info(cfg.launcher).local_rank
    check_own_device(device, local_rank)
    if device.type == 'cuda':
        return
    distributed.init_process_group(backend_of(device))
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    if not can_sync_norms(device):
        cfg.sync_bn = None


def check_own_device(device: torch.device, local_rank: int) -> None:
    """Make sure that a process works on the accelerator of its number. A CPU and Apple's GPU are shared.

    Args:
        device: Device that the process works on.
        local_rank: Number of the process on its machine.

    Raises:
        UserError: there are fewer accelerators than processes, or it works on another.
    """
    if backend_of(device) == 'gloo':
        return
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise UserError(
            f'Process {local_rank} of this machine has no device of its own: found {count} of kind {device.type} for '
            f'at least {local_rank + 1} processes.\n  Start at most {count} per machine. Under Slurm, let each task '
            'see all GPUs of its node (--gres or --gpus-per-node, with --gpu-bind=none).'
        )
    if device.index not in (None, local_rank):
        raise UserError(
            f'Process {local_rank} of this machine would work on {device}, and of several processes each has the '
            f'device of its number: expected --device {device.type}.'
        )


def backend_of(device: torch.device) -> str:
    """Return the backend for tensors of a device and, where that is an accelerator, of the CPU too."""
    backends = distributed.Backend.default_device_backend_map
    own = backends.get(device.type, 'gloo')
    return own if own in ('gloo', 'nccl') else f'cpu:gloo,{device.type}:{own}'


def can_sync_norms(device: torch.device) -> bool:
    """Return whether SyncBatchNorm works on a device: PyTorch has it for every backend but gloo."""
    return backend_of(device) != 'gloo'


def check_same_start(iteration: int | None) -> None:
    """Make sure that all processes resume from the same checkpoint.

    Args:
        iteration: That of this process's checkpoint; None at a fresh start.

    Raises:
        UserError: they do not; a shared file system may be late.
    """
    starts = all_gather_object(iteration)
    if len(set(starts)) > 1:
        found = ', '.join('none' if start is None else str(start) for start in starts)
        raise UserError(
            f'The processes would resume from checkpoints of different iterations: {found}. All machines must see the '
            'same work dir, or the same --store.'
        )
