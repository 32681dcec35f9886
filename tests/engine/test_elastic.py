"""Training that is interrupted in every way, starts itself again, and ends as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.batches import iterations, noting, processes, reached
from helpers.disks import STALLED
from helpers.scripts import STARTED, run, start
from helpers.tiny import write_tiny_config
from helpers.tools import descendants, free_port, is_running, run_tool, wait_until
from mmengine.config import Config

from projects.recnext.recnext.apis.train import share_batch
from projects.recnext.recnext.apis.train import train as run_train
from projects.recnext.recnext.utils.errors import START_AGAIN, PassingError, StartAgain, UserError, report_final
from projects.recnext.recnext.weights.checkpoint import find_newest_checkpoint, read_checkpoint

WITHOUT_CHANCE = """
model['backbone'].update(norm_eval=True, drop_path_rate=0.0)
model['decode_head'].update(norm_cfg=dict(type='GN', num_groups=4, requires_grad=True), dropout_ratio=0.0)
"""
"""Nothing in the network that depends on how a batch is shared out: dropout, statistics of norms."""


@pytest.fixture(autouse=True)
def nothing_left_running():
    """Whatever a failed test started is ended: torchrun takes its processes along."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=120)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)['state_dict']


def largest_difference(a: dict, b: dict) -> float:
    assert a.keys() == b.keys()
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


def samples(folder: Path) -> dict[int, list[str]]:
    """The samples of each iteration, of all processes together; each that was run more than once had the same."""
    together = {}
    for iteration, noted in iterations(folder).items():
        seen = {sample for _, drawn in noted for sample in drawn}
        together[iteration] = sorted(seen)
    return together


class Machine(threading.Thread):
    """A torchrun agent, and what starts it again when it was killed or says so, as Slurm and Kubernetes do."""

    def __init__(self, number: int, *command: object, **variables: str) -> None:
        super().__init__(daemon=True)
        self.number, self.command, self.variables = number, command, dict(variables, MACHINE=str(number))
        self.codes, self.said, self.process = [], [], None
        self.start()

    def run(self) -> None:
        while not self.codes or self.codes[-1] in (START_AGAIN, -signal.SIGKILL):
            self.process = start('dist_train.sh', *self.command, **self.variables)
            self.said.extend(self.process.stdout)
            self.codes.append(self.process.wait())

    def kill(self, notes: Path) -> None:
        """The agent and all its processes, as when the machine is lost."""
        self.process.kill()
        for pid in processes(notes, self.number):
            kill(pid)


def kill(pid: int) -> None:
    if is_running(pid):
        os.kill(pid, signal.SIGKILL)


KILLS = ('while it writes', 'a machine', 'a process')


@pytest.mark.parametrize('nodes', ['2', pytest.param('1:2', marks=pytest.mark.full)])
def test_two_machines_killed_at_random(full, scenes, tmp_path, nodes):
    kills, distance, rng = (12, 15, random.Random(0)) if full else (2, 8, random.Random(0))
    per_machine, notes, last = 2 if full else 1, tmp_path / 'notes', (kills + 1) * distance
    config = write_tiny_config(tmp_path, scenes, WITHOUT_CHANCE + noting(notes, pause=0.05))
    options = [
        '--total-batch-size',
        4,
        '--cfg-options',
        f'train_cfg.max_iters={last}',
        'default_hooks.logger.interval=10',
    ]
    # Quick to see that a machine is gone.
    conf = 'join_timeout=200,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3'
    where = dict(NNODES=nodes, MASTER_ADDR='127.0.0.1', PORT=free_port(), RDZV_CONF=conf, LOCAL_ADDR='127.0.0.1')
    arguments = [config, per_machine, '--max-restarts', kills + 1, '--work-dir', tmp_path / 'work', *options]
    machines = [Machine(number, *arguments, **where) for number in range(2)]
    for number in range(kills):
        how = KILLS[number % len(KILLS)]
        wait_until(
            lambda number=number: reached(notes) >= distance * (number + 1) or not all(m.is_alive() for m in machines)
        )
        assert all(machine.is_alive() for machine in machines), machines[0].said + machines[1].said
        time.sleep(rng.uniform(0, 0.1))  # anywhere in an iteration
        if how == 'while it writes':
            stalls = sum(STALLED in line for machine in machines for line in machine.said)
            (notes / 'stall').touch()
            wait_until(lambda: sum(STALLED in line for machine in machines for line in machine.said) > stalls)
            assert list((tmp_path / 'work').glob('.partial-*'))
            for pid in processes(notes, rank=0):
                kill(pid)
        elif how == 'a machine':
            machines[rng.randrange(2)].kill(notes)
        else:
            kill(rng.choice([pid for pid in processes(notes) if is_running(pid)]))
    for machine in machines:
        machine.join(timeout=300)
    assert [machine.codes[-1] for machine in machines if machine.codes] == [0, 0], machines[0].said + machines[1].said

    (tmp_path / 'undisturbed').mkdir()
    undisturbed = write_tiny_config(tmp_path / 'undisturbed', scenes, WITHOUT_CHANCE + noting(tmp_path / 'undisturbed'))
    run('dist_train.sh', undisturbed, 2 * per_machine, '--work-dir', tmp_path / 'reference', *options)
    ours, theirs = samples(notes), samples(tmp_path / 'undisturbed')
    assert ours == theirs and ours.keys() == set(range(1, last + 1))
    again = sum(len(noted) for noted in iterations(notes).values()) - last * 2 * per_machine
    one, two = weights(tmp_path / 'work' / f'iter_{last}.pth'), weights(tmp_path / 'reference' / f'iter_{last}.pth')
    difference = largest_difference(one, two)
    print(f'{kills} kills, {again} iterations of a process done again, largest difference {difference:.2g}')
    first = weights(tmp_path / 'reference' / 'iter_1.pth')
    assert difference < 1e-4 < largest_difference(first, two)
