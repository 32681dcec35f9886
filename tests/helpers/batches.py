"""What a training was fed, noted by its processes; and a disk that stalls when it is told to.

A config imports this as a part of its own (:func:`noting`).
"""

import hashlib
import os
import time
from collections import defaultdict
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from helpers.disks import STALLED

TESTS = Path(__file__).parents[1]


def noting(folder: Path, pause: float = 0) -> str:
    """Lines for a config: each process notes its samples in ``folder``, and sleeps so many seconds an iteration."""
    folder.mkdir(exist_ok=True)
    return f"""
import sys
sys.path.append({str(TESTS)!r})
custom_imports = dict(imports=['projects.recnext.recnext.openmmlab', 'helpers.batches'], allow_failed_imports=False)
custom_hooks = [dict(type='NoteBatchesHook', folder={str(folder)!r}, pause={pause})]
"""


@HOOKS.register_module(force=True)
class NoteBatchesHook(Hook):
    """Appends a line for each iteration to a file of the process: iteration, samples as the network sees them."""

    priority = 'HIGHEST'

    def __init__(self, folder: str, pause: float) -> None:
        self.folder, self.pause = Path(folder), pause
        self.flag = self.folder / 'stall'
        self.fsync = os.fsync

    def before_train(self, runner):
        os.fsync = self.fsync_or_stall

    def after_train(self, runner):
        os.fsync = self.fsync

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        samples = [hashlib.sha1(image.numpy().tobytes()).hexdigest() for image in data_batch['inputs']]
        name = f'{os.environ.get("MACHINE", 0)}-{get_rank()}-{os.getpid()}'
        with (self.folder / name).open('a') as file:
            file.write(f'{runner.iter + 1} {runner.world_size} {" ".join(samples)}\n')
        time.sleep(self.pause)

    def fsync_or_stall(self, descriptor):
        if self.flag.exists():
            self.flag.unlink()
            print(STALLED, flush=True)
            time.sleep(3600)
        self.fsync(descriptor)


def processes(folder: Path, machine: int | None = None, rank: int | None = None) -> list[int]:
    """Those that have noted something."""
    names = [path.name.split('-') for path in folder.glob('*-*-*')]
    return [int(pid) for of, number, pid in names if machine in (None, int(of)) and rank in (None, int(number))]


def machine_of(folder: Path, process: int) -> int:
    """Where a process runs."""
    (path,) = folder.glob(f'*-*-{process}')
    return int(path.name.split('-')[0])


def iterations(folder: Path) -> dict[int, list[tuple[int, list[str]]]]:
    """All that was noted of each iteration: with how many processes, and the samples of one of them."""
    noted = defaultdict(list)
    for path in folder.glob('*-*-*'):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith('\n'):  # else it was killed in it
                iteration, world_size, *samples = line.split()
                noted[int(iteration)].append((int(world_size), samples))
    return noted


def reached(folder: Path) -> int:
    """The last iteration that was begun."""
    return max(iterations(folder), default=0)
