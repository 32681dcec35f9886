"""Training that is interrupted in every way, starts itself again, and ends as if nothing had happened."""

import logging
import os
import random
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.batches import iterations, machine_of, noting, processes, reached
from helpers.disks import STALLED
from helpers.reference import ROOT
from helpers.scripts import STARTED, run, start
from helpers.tiny import write_tiny_config
from helpers.tools import free_port, is_running, wait_until, warm_python
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop

from projects.recnext.recnext.checkpoints.files import find_newest_checkpoint, read_checkpoint, write_checkpoint
from projects.recnext.recnext.openmmlab.stop_at_signal import StopAtSignalHook, StoppedInEpoch
from projects.recnext.recnext.openmmlab.train import TrainOptions, share_batch
from projects.recnext.recnext.openmmlab.train import train as run_train
from projects.recnext.recnext.utils.errors import START_AGAIN, UserError
from projects.recnext.recnext.utils.signals import StopRequest, noted_stop_signals

WITHOUT_CHANCE = """
model['backbone'].update(norm_eval=True, drop_path_rate=0.0)
model['decode_head'].update(norm_cfg=dict(type='GN', num_groups=4, requires_grad=True), dropout_ratio=0.0)
"""
"""Nothing in the network that depends on how a batch is shared out: dropout, statistics of norms."""

WITHOUT_VALIDATION = """
val_cfg = val_dataloader = val_evaluator = None
"""


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
    """A torchrun agent, and an operator that starts it again, as Slurm and Kubernetes do."""

    def __init__(self, number: int, *command: object, **variables: str) -> None:
        super().__init__(daemon=True)
        warm_python()  # one for all threads
        self.number, self.command, self.variables = number, command, dict(variables, MACHINE=str(number))
        self.codes, self.said, self.process = [], [], None
        self.start()

    def run(self) -> None:
        while not self.codes or (self.codes[-1] and len(self.codes) < 20):
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


KILLS = ('a machine that writes a checkpoint', 'a process', 'a process that writes a checkpoint', 'a machine')


@pytest.mark.parametrize('nodes', ['2', pytest.param('1:2', marks=pytest.mark.full)])
def test_two_machines_killed_at_random(full, scenes, tmp_path, nodes):
    kills, distance, per_machine, rng = (12, 15, 2, random.Random(0)) if full else (1, 5, 1, random.Random(0))
    notes, work, last = tmp_path / 'notes', tmp_path / 'work', (kills + 1) * distance
    config = write_tiny_config(tmp_path, scenes, WITHOUT_CHANCE + WITHOUT_VALIDATION + noting(notes, pause=0.05))
    settings = {'train_cfg.max_iters': last, 'default_hooks.logger.interval': 10}
    # Quick to see that a machine is gone.
    conf = 'join_timeout=300,last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3'
    where = dict(NNODES=nodes, MASTER_ADDR='127.0.0.1', PORT=free_port(), RDZV_CONF=conf, LOCAL_ADDR='127.0.0.1')
    where['OMP_NUM_THREADS'] = '1'  # all these machines are one
    arguments = [config, per_machine, '--max-restarts', kills + 1, '--work-dir', work, '--total-batch-size', 4]
    arguments += ['--cfg-options', *(f'{key}={value}' for key, value in settings.items())]
    machines = [Machine(number, *arguments, **where) for number in range(2)]

    def said() -> str:
        return ''.join(line for machine in machines for line in machine.said)

    for number in range(kills):
        how, due = KILLS[number % len(KILLS)], distance * (number + 1)
        wait_until(lambda due=due: reached(notes) >= due or not all(machine.is_alive() for machine in machines))
        assert all(machine.is_alive() for machine in machines), said()
        time.sleep(rng.uniform(0, 0.1))  # anywhere in an iteration
        if 'writes' in how:
            stalled = said().count(STALLED)
            (notes / 'stall').touch()
            wait_until(
                lambda stalled=stalled: said().count(STALLED) > stalled or not all(m.is_alive() for m in machines)
            )
            assert all(machine.is_alive() for machine in machines), said()
            assert list(work.glob('.partial-*'))
            victims = [pid for pid in processes(notes, rank=0) if is_running(pid)]
        else:
            victims = [rng.choice([pid for pid in processes(notes) if is_running(pid)])]
        for victim in victims:
            if 'machine' in how:
                machines[machine_of(notes, victim)].kill(notes)
            else:
                kill(victim)
    for machine in machines:
        machine.join(timeout=600)
    assert [machine.codes[-1] for machine in machines if machine.codes] == [0, 0], said()

    # Undisturbed: as many processes; or one, of all images, which is started sooner.
    folder = tmp_path / 'undisturbed'
    folder.mkdir()
    config = write_tiny_config(folder, scenes, WITHOUT_CHANCE + WITHOUT_VALIDATION + noting(folder / 'notes'))
    if full:
        run('dist_train.sh', config, 2 * per_machine, '--work-dir', folder, *arguments[6:])
    else:
        run_train(str(config), TrainOptions(str(folder), total_batch_size=4, cfg_options=settings))
    ours = samples(notes)
    assert ours == samples(folder / 'notes') and ours.keys() == set(range(1, last + 1))
    again = sum(len(drawn) for noted in iterations(notes).values() for _, drawn in noted) - 4 * last
    first, one, two = (
        weights(path) for path in (folder / 'iter_1.pth', *(w / f'iter_{last}.pth' for w in (folder, work)))
    )
    difference = largest_difference(one, two)
    print(f'{kills} kills of {last} iterations, {again} images trained on again, largest difference {difference:.2g}')
    moved = largest_difference(first, two)
    # Four processes add up gradients in another order after a start, as DDP lays its buckets out anew in its second
    # iteration, and training makes more of it. The sum of two is the same in any order.
    assert difference < (moved / 5 if full else 1e-4) < moved


def test_a_killed_process_is_started_again(scenes, tmp_path):
    """By torchrun, from the newest checkpoint; the weights are those of an undisturbed run, bit for bit."""
    notes, work, last = tmp_path / 'notes', tmp_path / 'work', 6
    config = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION + noting(notes, pause=0.05))
    changes = ['--cfg-options', f'train_cfg.max_iters={last}']
    process = start('dist_train.sh', config, 2, '--max-restarts', 1, '--work-dir', work, *changes)
    wait_until(lambda: reached(notes) >= 3 or process.poll() is not None)
    kill(processes(notes, rank=1)[0])
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    assert len(processes(notes)) == 4 and 'resumed epoch: 0, iter: ' in said
    folder = tmp_path / 'undisturbed'
    folder.mkdir()
    config = write_tiny_config(folder, scenes, WITHOUT_VALIDATION + noting(folder / 'notes'))
    run('dist_train.sh', config, 2, '--work-dir', folder, *changes)
    assert samples(notes) == samples(folder / 'notes')
    assert largest_difference(*(weights(path / f'iter_{last}.pth') for path in (work, folder))) == 0


def test_a_failure_that_repeats_itself_uses_up_the_restarts(scenes, tmp_path):
    explosion = "param_scheduler = [dict(type='MultiStepLR', milestones=[2], gamma=1e40, by_epoch=False)]"
    config = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION + explosion)
    process = start('dist_train.sh', config, 1, '--max-restarts', 1, '--work-dir', tmp_path / 'work')
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 1 and said.count('error: Training stopped in iteration 4: loss is nan') == 2


@pytest.mark.full
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group(scenes, tmp_path, number):
    """To the process and its data loaders, in the middle of work: a checkpoint of that iteration, and exactness."""
    notes, work = tmp_path / 'notes', tmp_path / 'work'
    config = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION + noting(notes, pause=0.05))
    changes = ['train_dataloader.num_workers=1', 'default_hooks.checkpoint.interval=1000', 'train_cfg.max_iters=1000']
    command = [warm_python(), ROOT / 'tools' / 'train.py', config, '--work-dir', work, '--cfg-options', *changes]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    STARTED.append(process)
    wait_until(lambda: reached(notes) >= 3 or process.poll() is not None)
    (trainer,) = processes(notes)
    before = reached(notes)
    os.killpg(os.getpgid(trainer), number)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == START_AGAIN, said
    stopped = reached(notes)
    assert before <= stopped <= before + 2  # this one, or one that began between two of our steps
    assert find_newest_checkpoint(work) == str(work / f'iter_{stopped}.pth')
    assert f'after iteration {stopped}. Started with --resume, training continues from {work}' in said
    options = {'train_cfg.max_iters': stopped + 2}
    run_train(str(config), TrainOptions(str(work), resume='auto', cfg_options=options))
    run_train(str(config), TrainOptions(str(tmp_path / 'undisturbed'), cfg_options=options))
    ours, theirs = (weights(folder / f'iter_{stopped + 2}.pth') for folder in (work, tmp_path / 'undisturbed'))
    assert largest_difference(ours, theirs) == 0


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_hands_a_signal_on(scenes, tmp_path, number):
    """SIGTERM, or Slurm's warning, to the agent: both processes stop after the same iteration, with a checkpoint."""
    notes, work = tmp_path / 'notes', tmp_path / 'work'
    config = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION + noting(notes, pause=0.05))
    changes = ['default_hooks.checkpoint.interval=1000', 'train_cfg.max_iters=1000']
    process = start('dist_train.sh', config, 2, '--work-dir', work, '--cfg-options', *changes)
    wait_until(lambda: reached(notes) >= 2 or process.poll() is not None)
    process.send_signal(number)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 1 and 'Stopped by a signal' in said, said
    stopped = reached(notes)
    assert len(iterations(notes)[stopped]) == 2
    assert find_newest_checkpoint(work) == str(work / f'iter_{stopped}.pth')


def test_training_by_epochs_leaves_at_once(tmp_path):
    """It cannot go on inside an epoch: nothing is written, and it says where it will go on."""
    hook = StopAtSignalHook(StopRequest())
    checkpoint = CheckpointHook(interval=1)
    runner = SimpleNamespace(
        iter=6, world_size=1, cfg=Config(dict(work_dir=str(tmp_path))), hooks=[checkpoint, hook], max_iters=100,
        logger=logging.getLogger('test'), train_loop=mock_loop(),
    )  # fmt: skip
    hook.after_train_iter(runner, 6, {})
    hook.request(signal.SIGTERM, None)
    with pytest.raises(StoppedInEpoch):
        hook.after_train_iter(runner, 6, {})
    assert 'starts from scratch' in hook.stopped
    runner.cfg.update(resume=True, load_from='.store/epoch_2.pth')
    with pytest.raises(StoppedInEpoch):
        hook.after_train_iter(runner, 6, {})
    assert hook.stopped.endswith('continues from .store/epoch_2.pth.')
    torch.save({}, tmp_path / 'epoch_3.pth')
    with pytest.raises(StoppedInEpoch):
        hook.after_train_iter(runner, 6, {})
    assert hook.stopped.endswith(f'continues from {tmp_path / "epoch_3.pth"}.')


def mock_loop() -> EpochBasedTrainLoop:
    return EpochBasedTrainLoop.__new__(EpochBasedTrainLoop)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with noted_stop_signals() as request:
        assert request.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    with ThreadPoolExecutor() as threads:  # a notebook's server, say
        threads.submit(lambda: noted_stop_signals().__enter__()).result()


@pytest.mark.full
def test_more_and_fewer_processes(scenes, tmp_path):
    """2, 1 and 2 processes: the samples of every iteration are those of a run that was always one process."""
    notes, work = tmp_path / 'notes', tmp_path / 'work'
    config = write_tiny_config(tmp_path, scenes, WITHOUT_CHANCE + WITHOUT_VALIDATION + noting(notes))
    options = ['--work-dir', work, '--total-batch-size', 4]
    run('dist_train.sh', config, 2, *options, '--cfg-options', 'train_cfg.max_iters=2')
    run_train(str(config), TrainOptions(str(work), 'auto', total_batch_size=4, cfg_options={'train_cfg.max_iters': 5}))
    said = run('dist_train.sh', config, 2, *options, '--resume', '--cfg-options', 'train_cfg.max_iters=7')
    assert '4 images per iteration (2 processes x 2)' in said
    folder = tmp_path / 'one'
    folder.mkdir()
    config = write_tiny_config(folder, scenes, WITHOUT_CHANCE + WITHOUT_VALIDATION + noting(folder / 'notes'))
    run_train(str(config), TrainOptions(str(folder), total_batch_size=4, cfg_options={'train_cfg.max_iters': 7}))
    noted = iterations(notes)
    assert [{world_size for world_size, _ in noted[number]} for number in range(1, 8)] == [{2}] * 2 + [{1}] * 3 + [
        {2}
    ] * 2
    assert samples(notes) == samples(folder / 'notes')
    assert largest_difference(weights(work / 'iter_7.pth'), weights(folder / 'iter_7.pth')) < 1e-5


@pytest.mark.full
def test_other_images_an_iteration_still_take_each_sample_once(scenes, tmp_path):
    """Without --total-batch-size; and a checkpoint that does not say how many went before is taken as before."""
    notes, work = tmp_path / 'notes', tmp_path / 'work'
    config = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION + noting(notes))
    run_train(str(config), TrainOptions(str(work), total_batch_size=3, cfg_options={'train_cfg.max_iters': 2}))
    run_train(str(config), TrainOptions(str(work), 'auto', cfg_options={'train_cfg.max_iters': 4}))
    folder = tmp_path / 'alone'
    folder.mkdir()
    alone = write_tiny_config(folder, scenes, WITHOUT_VALIDATION + noting(folder / 'notes'))
    run_train(str(alone), TrainOptions(str(folder), total_batch_size=1, cfg_options={'train_cfg.max_iters': 10}))
    order = [samples(folder / 'notes')[number][0] for number in range(1, 11)]
    assert samples(notes) == {1: sorted(order[:3]), 2: sorted(order[3:6]), 3: sorted(order[6:8]), 4: sorted(order[8:])}

    old = read_checkpoint(work / 'iter_2.pth')
    del old['message_hub']['runtime_info']['samples_drawn']
    write_checkpoint(old, folder / 'old.pth')
    (notes_of_old := folder / 'notes of old').mkdir()
    config = write_tiny_config(folder, scenes, WITHOUT_VALIDATION + noting(notes_of_old))
    run_train(
        str(config), TrainOptions(str(folder / 'work'), str(folder / 'old.pth'), cfg_options={'train_cfg.max_iters': 3})
    )
    assert samples(notes_of_old) == {3: sorted(order[4:6])}  # 2 iterations of 2 images


def test_a_batch_that_cannot_be_shared_out():
    cfg = Config(dict(train_dataloader=dict(batch_size=2)))
    share_batch(cfg, 12, 4)
    assert cfg.train_dataloader.batch_size == 3
    with pytest.raises(UserError, match='--total-batch-size 12 cannot be shared out among 5 processes'):
        share_batch(cfg, 12, 5)


@pytest.mark.parametrize('wrong', [['--max-restarts'], ['--max-restarts', 'two'], ['--max-restarts=-1']])
def test_wrong_use_of_restarts(wrong):
    process = start('dist_train.sh', 'config.py', '2', *wrong)
    assert 'usage' in process.communicate()[0] and process.returncode == 2


@pytest.mark.parametrize('code, requeued', [(75, True), (143, True), (0, False), (1, False)])
def test_the_slurm_script_requeues(tmp_path, code, requeued):
    for name, content in (('srun', f'echo "srun $@"; exit {code}'), ('scontrol', 'echo "scontrol $@"')):
        (tmp_path / name).write_text(f'#!/bin/sh\n{content}\n')
        (tmp_path / name).chmod(0o755)
    variables = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', SLURM_JOB_ID='7', SLURM_SUBMIT_DIR=str(ROOT))
    command = ['bash', ROOT / 'tools' / 'slurm_train_requeue.sbatch', 'config.py', '--amp']
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert f'{ROOT}/tools/train.py config.py --amp --resume --launcher slurm' in result.stdout
    assert ('scontrol requeue 7' in result.stdout) == requeued
    assert result.returncode == (0 if requeued else code)
