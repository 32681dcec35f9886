"""Several processes, on GPUs with NCCL and without GPUs with gloo."""

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.dist import barrier
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import distributed

from .errors import UserError


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


class GatherInWorkDirHook(Hook):
    """Lets the metrics of several processes gather their parts in the work dir.

    Defect: mmengine makes a folder ``.dist_test`` where the run was started, and leaves it there.

    Repair: a folder that it is told the name of, it removes.
    """

    def before_val_epoch(self, runner: Runner) -> None:
        """For validation."""
        self._name_folder(runner, runner.val_loop.evaluator)

    def before_test_epoch(self, runner: Runner) -> None:
        """For testing."""
        self._name_folder(runner, runner.test_loop.evaluator)

    def _name_folder(self, runner: Runner, evaluator: Evaluator) -> None:
        for metric in evaluator.metrics:
            if metric.collect_device == 'cpu' and metric.collect_dir is None:
                metric.collect_dir = str(Path(runner.work_dir, '.gathering'))


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


class Place(NamedTuple):
    """Which of several processes this one is."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def find_place(launcher: str) -> Place:
    """This process among those that work on one task side by side, without ever joining.

    Args:
        launcher: What started them: ``'none'``, ``'pytorch'`` (torchrun, or what sets its variables) or ``'slurm'``.
    """
    if launcher == 'none':
        return Place()
    if launcher == 'slurm':
        _name_slurm_process()
    return Place(*(int(os.environ[name]) for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')))


def end_last(place: Place) -> None:
    """Let the first of the processes under torchrun end after the others; elsewhere there is nothing to do.

    torchrun ends all processes when one fails, so the one that reports failed inputs has to wait. If another dies,
    torchrun ends this one as well: it does not wait for ever.

    Raises:
        UserError: torchrun itself is gone.
    """
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return
    host, port, limit = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), timedelta(seconds=60)
    ended = f'recnext/ended/{os.environ.get("TORCHELASTIC_RESTART_COUNT")}'
    try:
        # The store is torchrun's own: it outlives each of the processes.
        store = distributed.TCPStore(host, port, is_master=False, timeout=limit)
        number = store.add(ended, 1)
        while place.rank == 0 and number < place.world_size:
            time.sleep(0.2)
            number = store.add(ended, 0)
    except distributed.DistError:
        raise UserError('torchrun is gone; this process is through. Start the same command again.') from None
