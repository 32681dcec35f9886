"""A run that is killed anywhere and resumed ends with the weights of the run that was not."""

import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.disks import STALLED, stalling_disk
from helpers.reference import ROOT
from helpers.tiny import write_tiny_config
from helpers.tools import assert_user_error, run_tool
from mmengine.config import Config
from mmengine.dataset import InfiniteSampler
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from projects.recnext.recnext.checkpoints.files import CheckpointError, find_newest_checkpoint, read_checkpoint
from projects.recnext.recnext.openmmlab.resume import ATOMIC, only_data, read_newest, write_atomically
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


def logged(work_dir: Path) -> str:
    """Of all runs: mmengine gives those of one process that start in the same second one log."""
    return ''.join(path.read_text() for path in work_dir.glob('*/*.log'))


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


class TestAtomicBackend:
    """Local checkpoints are there in full or not at all; whatever is no regular file stays what it is."""

    backend = get_file_backend(backend_args=dict(backend=ATOMIC))

    def test_a_full_disk_leaves_what_was_there(self, tmp_path, monkeypatch):
        path = tmp_path / 'new' / 'a.pth'
        self.backend.put(b'old', path)

        def full_disk(descriptor):
            raise OSError(28, 'No space left on device')

        monkeypatch.setattr(os, 'fsync', full_disk)
        for kind in (OSError, UserError):
            with pytest.raises(kind, match=r'a\.pth cannot be written: the disk is full'):
                self.backend.put(b'new', path)
        assert path.read_bytes() == b'old' and [p.name for p in path.parent.iterdir()] == ['a.pth']

    def test_links_pipes_and_devices_stay(self, tmp_path):
        (tmp_path / 'target').write_bytes(b'old')
        (tmp_path / 'link').symlink_to('target')
        self.backend.put(b'new', tmp_path / 'link')
        assert (tmp_path / 'link').is_symlink() and (tmp_path / 'target').read_bytes() == b'new'
        os.mkfifo(tmp_path / 'pipe')
        with ThreadPoolExecutor() as pool:
            written = pool.submit(self.backend.put, b'through', tmp_path / 'pipe')
            assert (tmp_path / 'pipe').read_bytes() == b'through' and written.result() is None
        assert (tmp_path / 'pipe').is_fifo()
        self.backend.put(b'gone', '/dev/null')
        assert Path('/dev/null').is_char_device()

    def test_it_can_be_pickled_and_is_nobodys_default(self, tmp_path):
        assert type(pickle.loads(pickle.dumps(self.backend))) is type(self.backend)
        assert type(get_file_backend(tmp_path)) is LocalBackend

    @pytest.mark.parametrize(
        ('hook', 'backend'),
        [
            ({}, dict(backend=ATOMIC)),
            (dict(out_dir='elsewhere'), dict(backend=ATOMIC)),
            (dict(out_dir='s3://bucket/runs'), None),
            (dict(backend_args=dict(backend='local')), dict(backend='local')),
        ],
    )
    def test_checkpoints_of_this_machine_are_written_through_it(self, hook, backend):
        cfg = Config(dict(work_dir='w', default_hooks=dict(checkpoint=dict(type='CheckpointHook', **hook))))
        write_atomically(cfg)
        assert cfg.default_hooks.checkpoint.get('backend_args') == backend
        bare = Config(dict(work_dir='w'))
        write_atomically(bare)
        assert bare.default_hooks.checkpoint == dict(type='CheckpointHook', backend_args=dict(backend=ATOMIC))


@pytest.mark.parametrize(
    ('hook', 'folder', 'name'),
    [
        (dict(by_epoch=False), 'runs/mine', 'iter_{}.pth'),
        ({}, 'runs/mine', 'epoch_{}.pth'),
        (dict(filename_tmpl='model_{}.pth'), 'runs/mine', 'model_{}.pth'),
        (dict(filename_tmpl='m{:06d}[x].pth'), 'runs/mine', 'm{:06d}[x].pth'),
        (dict(by_epoch=False, out_dir='out'), 'out/mine', 'iter_{}.pth'),
        (dict(type=CheckpointHook, by_epoch=False), 'runs/mine', 'iter_{}.pth'),
        (dict(type='KeptHook', by_epoch=False), 'runs/mine', 'iter_{}.pth'),
    ],
)
def test_what_to_resume_is_what_the_checkpoint_hook_writes(tmp_path, monkeypatch, hook, folder, name):
    monkeypatch.chdir(tmp_path)
    hook = dict(dict(type='CheckpointHook'), **hook)
    cfg = Config(dict(work_dir='runs/mine/', default_hooks=dict(checkpoint=hook)))
    assert read_newest(cfg) is None
    for other in ('runs/mine', folder):
        Path(other).mkdir(parents=True, exist_ok=True)
        for stray in ('iter_800.pth', 'epoch_700.pth', 'best_mIoU_iter_900.pth', '.iter_11.pth.77.partial'):
            torch.save(dict(stray=stray), Path(other, stray))
    for stray in Path(folder).glob(name.partition('{')[0] + '*'):
        stray.unlink()
    for number in (9, 10):
        torch.save(dict(meta=dict(iter=number)), Path(folder, name.format(number)))
    assert read_newest(cfg)[0] == Path(folder, name.format(10))
    cut(Path(folder, name.format(10)))
    path, content, damaged = read_newest(cfg)
    assert path == Path(folder, name.format(9)) and content == dict(meta=dict(iter=9)) and len(damaged) == 1


def test_a_checkpoint_without_a_number_is_none_to_go_on_from(tmp_path):
    hook = dict(type='CheckpointHook', filename_tmpl='last.pth')
    torch.save(dict(meta={}), tmp_path / 'last.pth')
    assert read_newest(Config(dict(work_dir=str(tmp_path), default_hooks=dict(checkpoint=hook)))) is None


@HOOKS.register_module()
class KeptHook(CheckpointHook):
    """A user's own, which keeps something of its own in the checkpoint."""

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['kept'] = dict(iteration=runner.iter + 1)

    def after_load_checkpoint(self, runner, checkpoint):
        runner.logger.info(f'kept of iteration {checkpoint["kept"]["iteration"]}')


def test_hooks_of_a_users_own_get_back_what_they_kept(scenes, tmp_path):
    extra = "default_hooks['checkpoint'].update(type='KeptHook')"
    config, work = write_tiny_config(tmp_path, scenes, extra), tmp_path / 'work'
    for iterations in (1, 2):
        options = {'train_cfg.max_iters': iterations}
        run_train(str(config), TrainOptions(str(work), resume='auto', cfg_options=options))
    assert 'kept of iteration 1' in logged(work)


def test_the_best_checkpoint_is_that_of_the_folder_wherever_it_is(tmp_path):
    def resumed(path: str) -> dict:
        info = dict(best_ckpt=path, best_score=50.0, iter=4, cfg='x = 1')
        hub = dict(runtime_info=info, resumed_keys=dict.fromkeys(info, True), log_scalars={})
        cfg = Config(dict(work_dir=str(tmp_path)))
        return only_data(dict(state_dict={}, meta={}, message_hub=hub), cfg)['message_hub']

    own = tmp_path / 'best_mIoU_iter_4.pth'
    assert resumed('elsewhere/best_mIoU_iter_4.pth')['runtime_info'] == dict(iter=4)  # the next is the best
    assert resumed('elsewhere/best_mIoU_iter_4.pth')['resumed_keys'] == dict(iter=True)
    own.touch()
    for path in (own, 'elsewhere/best_mIoU_iter_4.pth'):
        assert resumed(str(path))['runtime_info'] == dict(best_ckpt=str(own), best_score=50.0, iter=4)


def test_of_two_hooks_the_one_that_wrote_last_counts(tmp_path):
    hooks = [dict(type='CheckpointHook'), dict(type='mmengine.CheckpointHook', by_epoch=False)]
    cfg = Config(dict(work_dir=str(tmp_path), default_hooks=dict(checkpoint=hooks[0]), custom_hooks=hooks[1:]))
    for name, iteration in (('epoch_3.pth', 900), ('iter_800.pth', 800)):
        torch.save(dict(meta=dict(iter=iteration)), tmp_path / name)
    assert read_newest(cfg)[0].name == 'epoch_3.pth'


def test_a_run_with_names_of_its_own_is_resumed(scenes, tmp_path):
    out, names = tmp_path / 'out' / 'work', 'model_{}.pth'
    extra = f"default_hooks['checkpoint'].update(filename_tmpl={names!r}, out_dir={str(out.parent)!r})"
    config = write_tiny_config(tmp_path, scenes, extra)
    for iterations in (1, 2):
        options = {'train_cfg.max_iters': iterations}
        run_train(str(config), TrainOptions(str(tmp_path / 'work'), resume='auto', cfg_options=options))
    assert read_checkpoint(out / 'model_2.pth')['meta']['iter'] == 2
    assert 'resumed epoch: 0, iter: 1' in logged(tmp_path / 'work')


@pytest.mark.parametrize('key', ['meta.config', 'meta.cfg', 'hub.cfg'])
def test_no_text_of_a_checkpoint_is_run(scenes, undisturbed, tmp_path, key):
    """Neither now nor by those who load what this run writes, such as mmseg's inferencer without a config."""
    attack = f"__import__('pathlib').Path({str(tmp_path / 'made')!r}).touch()"
    content = torch.load(undisturbed.with_name('iter_5.pth'), weights_only=False)
    place = content['message_hub']['runtime_info'] if key == 'hub.cfg' else content['meta']
    place[key.partition('.')[2]] = f'x = {attack}'
    torch.save(content, tmp_path / 'attack.pth')
    config, work = write_tiny_config(tmp_path, scenes), tmp_path / 'work'
    run_train(str(config), TrainOptions(str(work), resume=str(tmp_path / 'attack.pth')))
    assert not (tmp_path / 'made').exists()
    written = torch.load(work / 'iter_8.pth', weights_only=False)
    assert attack not in written['message_hub']['runtime_info']['cfg'] and attack not in str(written['meta'])
    assert_bit_equal(weights(work / 'iter_8.pth'), weights(undisturbed))


def test_a_checkpoint_names_no_file_for_removal(scenes, undisturbed, tmp_path):
    """CheckpointHook removes the best checkpoint so far, where the message hub says that it is, for a better one."""
    precious = tmp_path / 'best_photos'
    precious.mkdir()
    content = torch.load(undisturbed.with_name('iter_5.pth'), weights_only=False)
    content['message_hub']['runtime_info'].update(best_ckpt=str(precious), best_score=-1.0, keep_ckpt_ids=['../a'])
    torch.save(content, tmp_path / 'attack.pth')
    config = write_tiny_config(tmp_path, scenes, "default_hooks['checkpoint'].update(save_best='mIoU')")
    options = {'train_cfg.max_iters': 6, 'train_cfg.val_interval': 6, 'default_hooks.checkpoint.max_keep_ckpts': 1}
    resumed = TrainOptions(str(tmp_path / 'work'), resume=str(tmp_path / 'attack.pth'), cfg_options=options)
    run_train(str(config), resumed)
    assert precious.is_dir() and list(tmp_path.glob('work/best_mIoU_iter_*.pth'))


def test_a_sampler_that_needs_our_loop_says_so(scenes, tmp_path):
    config = write_tiny_config(tmp_path, scenes)
    options = {'train_cfg.type': 'IterBasedTrainLoop'}
    with pytest.raises(UserError, match=r'ResumableSampler needs train_cfg\.type=ResumableTrainLoop'):
        run_train(str(config), TrainOptions(str(tmp_path / 'work'), cfg_options=options))


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
    said = train(write_tiny_config(tmp_path, scenes), work, '--resume')
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
