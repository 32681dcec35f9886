"""A run that is killed anywhere and resumed ends with the weights of the run that was not."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.disks import STALLED, stalling_disk
from helpers.reference import ROOT
from helpers.tiny import write_tiny_config
from helpers.tools import assert_user_error, run_tool
from mmengine.dataset import InfiniteSampler
from mmengine.fileio import get_file_backend
from mmengine.runner import runner

from projects.recnext.recnext.checkpoints.files import CheckpointError, find_newest_checkpoint, read_checkpoint
from projects.recnext.recnext.openmmlab.seeded import ResumableSampler
from projects.recnext.recnext.openmmlab.train import TrainOptions
from projects.recnext.recnext.openmmlab.train import train as run_train
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.files import PARTIAL


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'scenes'
    write_dataset(root, training=7, validation=3)
    return root


def train(config: Path, work_dir: Path, *options: object) -> str:
    result = run_tool('train', config, '--work-dir', work_dir, *options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)['state_dict']


def assert_bit_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


@pytest.fixture(scope='module')
def undisturbed(scenes, tmp_path_factory) -> Path:
    """The last checkpoint of 8 iterations without workers."""
    folder = tmp_path_factory.mktemp('undisturbed')
    train(write_tiny_config(folder, scenes), folder / 'work')
    return folder / 'work' / 'iter_8.pth'


@pytest.mark.parametrize('workers', [pytest.param(0, marks=pytest.mark.full), 2])
def test_stopped_and_resumed(scenes, undisturbed, tmp_path, workers):
    config = write_tiny_config(tmp_path, scenes)
    options = ['--cfg-options', f'train_dataloader.num_workers={workers}']
    train(config, tmp_path / 'work', *options, 'train_cfg.max_iters=3')
    said = train(config, tmp_path / 'work', '--resume', *options)
    assert 'resumed epoch: 0, iter: 3' in said and 'Iter(train) [4/8]' in said and 'Iter(train) [3/8]' not in said
    assert_bit_equal(weights(tmp_path / 'work' / 'iter_8.pth'), weights(undisturbed))


@pytest.mark.full
def test_another_seed_is_another_run(scenes, undisturbed, tmp_path):
    config = write_tiny_config(tmp_path, scenes)
    train(config, tmp_path / 'work', '--cfg-options', 'randomness.seed=1')
    other = weights(tmp_path / 'work' / 'iter_8.pth')
    assert any(not torch.equal(tensor, other[key]) for key, tensor in weights(undisturbed).items())


def test_another_sampler_is_refused(scenes, tmp_path):
    config = write_tiny_config(tmp_path, scenes)
    options = ['--cfg-options', 'train_dataloader.sampler.type=InfiniteSampler']
    assert_user_error(run_tool('train', config, '--work-dir', tmp_path / 'work', *options), 'type=ResumableSampler')


def test_resume_from_a_named_checkpoint(scenes, undisturbed, tmp_path):
    config = write_tiny_config(tmp_path, scenes)
    train(config, tmp_path / 'work', '--resume', undisturbed.with_name('iter_5.pth'))
    assert_bit_equal(weights(tmp_path / 'work' / 'iter_8.pth'), weights(undisturbed))


def test_killed_at_random_moments(full, scenes, tmp_path):
    """SIGKILL, every other time while a checkpoint is written; the end is as if nothing had been."""
    config, work, rng = write_tiny_config(tmp_path, scenes), tmp_path / 'work', random.Random(0)
    command = [sys.executable, '-u', ROOT / 'tools' / 'train.py', config, '--work-dir', work, '--resume']
    command += ['--cfg-options', 'train_cfg.max_iters=100000']  # however long a busy machine takes to kill it
    for kill in range(20 if full else 1):
        in_writing = kill % 2 == 0
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=stalling_disk(tmp_path, rng.randrange(2, 6) if in_writing else 100000), start_new_session=True,
        )  # fmt: skip
        reached, said, left = 0, [], rng.randrange(1, 5)
        for line in process.stdout:
            said.append(line)
            if match := re.search(r'Iter\(train\) \[ *(\d+)/', line):
                reached, left = int(match[1]), left - 1
            if STALLED in line or (left <= 0 and not in_writing):
                break
        time.sleep(0 if in_writing else rng.uniform(0, 0.2))  # anywhere in an iteration
        assert process.poll() is None, ''.join(said)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert list(work.glob(f'{PARTIAL}*')) or not in_writing
        newest = find_newest_checkpoint(work)
        assert (0 if newest is None else read_checkpoint(newest)['meta']['iter']) >= reached - 1
    iterations = read_checkpoint(newest)['meta']['iter'] + 2
    options = ['--cfg-options', f'train_cfg.max_iters={iterations}']
    train(config, work, '--resume', *options)
    assert not list(work.glob(f'{PARTIAL}*'))
    train(config, tmp_path / 'undisturbed', *options)
    assert_bit_equal(
        weights(work / f'iter_{iterations}.pth'), weights(tmp_path / 'undisturbed' / f'iter_{iterations}.pth')
    )


@pytest.mark.parametrize('world_size', [1, 2, 3])
@pytest.mark.parametrize('start', [0, 1, 5, 23, 1000])
def test_sampler_starts_anywhere_in_mmengines_order(monkeypatch, world_size, start):
    for rank in range(world_size):
        monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda rank=rank: (rank, world_size))
        reference = iter(InfiniteSampler(range(7), seed=3))
        sampler = ResumableSampler(range(7), seed=3)
        sampler.start = start * world_size
        drawn = iter(sampler)
        expected = [next(reference) for _ in range(start + 20)][start:]
        got = [next(drawn) for _ in range(20)]
        assert [index for _, index in got] == expected
        assert [place for place, _ in got] == [rank + world_size * (start + k) for k in range(20)]


def test_resuming_late_is_as_quick_as_starting(monkeypatch):
    sampler = ResumableSampler(range(20210), seed=0)
    sampler.start = 160_000
    place, index = next(iter(sampler))
    assert place == 160_000 and 0 <= index < 20210


def test_files_are_written_atomically(tmp_path, monkeypatch):
    path = tmp_path / 'new' / 'a.pth'
    backend = get_file_backend(path)
    backend.put(b'old', path)

    def full_disk(descriptor):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full_disk)
    with pytest.raises(UserError, match=r'a\.pth cannot be written: the disk is full'):
        backend.put(b'new', path)
    assert path.read_bytes() == b'old' and [p.name for p in path.parent.iterdir()] == ['a.pth']


def test_newest_checkpoint_does_not_depend_on_mmengines_note(tmp_path):
    assert find_newest_checkpoint(tmp_path) is None and find_newest_checkpoint(tmp_path / 'no') is None
    for name in ('iter_9.pth', 'iter_10.pth', 'best_mIoU_iter_12.pth', '.iter_11.pth.77.partial'):
        torch.save({}, tmp_path / name)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_'))
    assert find_newest_checkpoint(tmp_path) == str(tmp_path / 'iter_10.pth')
    assert runner.find_latest_checkpoint(str(tmp_path)) == str(tmp_path / 'iter_10.pth')
    cut(tmp_path / 'iter_10.pth')
    assert runner.find_latest_checkpoint(str(tmp_path)) == str(tmp_path / 'iter_9.pth')
    assert runner.find_latest_checkpoint(str(tmp_path / 'no')) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_power(path: Path) -> None:
    """As some file systems leave what was not yet on the disk: of full length, and zeros."""
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b'')


def copy_of(work: Path, to: Path, *iterations: int) -> Path:
    to.mkdir()
    for iteration in iterations:
        shutil.copy(work / f'iter_{iteration}.pth', to)
    return to


@pytest.mark.parametrize('harm', [lose_power, *(pytest.param(harm, marks=pytest.mark.full) for harm in (cut, empty))])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(scenes, undisturbed, tmp_path, harm):
    work = copy_of(undisturbed.parent, tmp_path / 'work', 5, 6, 7)
    harm(work / 'iter_6.pth')
    harm(work / 'iter_7.pth')
    run_train(str(write_tiny_config(tmp_path, scenes)), TrainOptions(str(work), resume='auto'))
    said = next(work.glob('*/*.log')).read_text()
    (line,) = (line for line in said.splitlines() if 'goes on from' in line)
    assert 'WARNING' in line and line.endswith(f'Training goes on from {work / "iter_5.pth"}.')
    assert f'{work / "iter_7.pth"} is ' in line and f'{work / "iter_6.pth"} is ' in line
    assert 'resumed epoch: 0, iter: 5' in said
    assert_bit_equal(weights(work / 'iter_8.pth'), weights(undisturbed))


def test_where_no_checkpoint_is_whole_all_are_named_and_kept(scenes, undisturbed, tmp_path):
    work = copy_of(undisturbed.parent, tmp_path / 'work', 5, 6)
    cut(work / 'iter_5.pth')
    empty(work / 'iter_6.pth')
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    result = run_tool('train', write_tiny_config(tmp_path, scenes), '--work-dir', work, '--resume')
    words = (
        f'No checkpoint in {work} can be read',
        'iter_5.pth is truncated',
        'iter_6.pth is empty',
        'from the beginning',
    )
    assert_user_error(result, *words)
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before


def test_a_damaged_checkpoint_that_is_named_is_an_error(scenes, undisturbed, tmp_path):
    work = copy_of(undisturbed.parent, tmp_path / 'work', 5, 6)
    cut(work / 'iter_6.pth')
    with pytest.raises(CheckpointError, match=r'iter_6\.pth is truncated or damaged'):
        run_train(str(write_tiny_config(tmp_path, scenes)), TrainOptions(str(work), resume=str(work / 'iter_6.pth')))
