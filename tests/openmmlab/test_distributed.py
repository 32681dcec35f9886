"""Several real processes without a GPU: the same numbers, the same weights, and an end to everything when one dies."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.reference import ROOT, config_of
from helpers.scripts import metrics, run, start
from helpers.tiny import write_tiny_config
from helpers.tools import descendants, free_port, is_running, run_tool, wait_until
from PIL import Image

from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.openmmlab.distributed import get_process_info
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'sce nes'
    write_dataset(root, training=8, validation=5)
    return root


@pytest.fixture(scope='module')
def trained(scenes, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny config and a checkpoint of it."""
    folder = tmp_path_factory.mktemp('trained')
    config = write_tiny_config(folder, scenes)
    result = run_tool('train', config, '--work-dir', folder / 'work', '--cfg-options', 'train_cfg.max_iters=4')
    assert result.returncode == 0, result.stderr
    return config, folder / 'work' / 'iter_4.pth'


def maps(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.glob('*.png'))}


@pytest.mark.parametrize('processes', [pytest.param(1, marks=pytest.mark.full), 3])
def test_testing_gives_the_same_numbers_and_maps(trained, tmp_path, processes):
    config, checkpoint = trained
    alone = run_tool('test', config, checkpoint, '--out', tmp_path / 'alone', '--work-dir', tmp_path / 'work')
    assert alone.returncode == 0, alone.stderr
    out = tmp_path / 'to gether'
    said = run(
        'dist_test.sh', config, checkpoint, processes, '--eval', 'mIoU', '--out', out, '--work-dir', tmp_path / 'w'
    )
    assert metrics(said) == metrics(alone.stdout)
    ours, theirs = maps(out), maps(tmp_path / 'alone')
    assert ours.keys() == theirs.keys() and len(ours) == 5
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.full
def test_the_real_images_in_two_processes(real_m3, ade20k_sample, tmp_path):
    options = ['--data-root', ade20k_sample, '--work-dir', tmp_path]
    said = run('dist_test.sh', config_of('m3'), real_m3, 2, *options)
    assert 'aAcc: 88.6900  mIoU: 38.6000  mAcc: 46.7300' in said
    # Where the processes gather what they have measured, mmengine would leave a folder.
    assert not (Path.cwd() / '.dist_test').exists() and not (tmp_path / '.gathering').exists()


FROZEN_NORMS = """
model['backbone'].update(norm_eval=True, drop_path_rate=0.0)
model['decode_head'].update(norm_cfg=dict(type='GN', num_groups=4, requires_grad=True), dropout_ratio=0.0)
"""


@pytest.fixture(scope='module')
def two_processes(scenes, tmp_path_factory) -> tuple[str, Path]:
    """What two processes said that trained 5 iterations and tested, and their work dir."""
    folder = tmp_path_factory.mktemp('two')
    config = write_tiny_config(folder, scenes, FROZEN_NORMS)
    options = ['train_cfg.max_iters=5', 'train_cfg.val_interval=5']
    arguments = ['--work-dir', folder / 'work', '--cfg-options', *options]
    said = run('dist_train.sh', config, 2, *arguments)
    return said, folder / 'work'


def test_two_processes_of_two_images_train_as_one_of_four(two_processes, scenes, tmp_path):
    said, folder = two_processes
    assert '4 images per iteration (2 processes x 2)' in said and 'As in the recipe' in said and 'mIoU' in said
    config = write_tiny_config(tmp_path, scenes, FROZEN_NORMS)
    options = ['train_cfg.max_iters=5', 'train_dataloader.batch_size=4']
    result = run_tool('train', config, '--work-dir', tmp_path, '--cfg-options', *options)
    assert result.returncode == 0, result.stderr
    first, one, two = (
        read_checkpoint(p)['state_dict']
        for p in (tmp_path / 'iter_1.pth', tmp_path / 'iter_5.pth', folder / 'iter_5.pth')
    )
    weights = [key for key in one if one[key].is_floating_point()]
    assert max((one[key] - first[key]).abs().max() for key in weights) > 1e-4
    assert max((one[key] - two[key]).abs().max() for key in weights) < 1e-5


TRAINS_AND_COUNTS = """
import os, sys
from projects.recnext.recnext.openmmlab.train import train
train(sys.argv[1], work_dir=sys.argv[2], launcher='pytorch', cfg_options={'train_cfg.max_iters': 1})
print('threads left:', len(os.listdir('/proc/self/task')))
"""


@pytest.mark.full
def test_no_thread_outlives_training(scenes, tmp_path):
    """One that frees a tensor while the interpreter ends aborts it: a finished run would be reported as failed."""
    config = write_tiny_config(tmp_path, scenes)
    where = dict(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port())
    result = subprocess.run(
        [sys.executable, '-c', TRAINS_AND_COUNTS, config, tmp_path / 'work'],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **where, 'OMP_NUM_THREADS': '1'}, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert 'threads left: 1\n' in result.stdout


@pytest.mark.full
@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh'])
def test_two_machines_on_one(trained, tmp_path, script):
    config, checkpoint = trained
    args, done = [config, checkpoint, 1], 'mIoU'
    if script == 'dist_train.sh':
        args, done = [config, 1, '--cfg-options', 'train_cfg.max_iters=2'], '[2/2]'
    where = dict(NNODES='2', MASTER_ADDR='127.0.0.1', PORT=free_port())
    work = ['--work-dir', tmp_path / 'work']
    machines = [start(script, *args, *work, **where, NODE_RANK=str(rank)) for rank in (0, 1)]
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert done in said[0]
    assert (tmp_path / 'work' / 'iter_2.pth').exists() == (script == 'dist_train.sh')


@pytest.mark.full
@pytest.mark.parametrize('victim', ['training process', 'data loader'])
def test_one_process_killed_ends_them_all(scenes, tmp_path, victim):
    config = write_tiny_config(tmp_path, scenes)
    options = ['train_cfg.max_iters=100000', 'train_dataloader.num_workers=1']
    arguments = ['--work-dir', tmp_path / 'work', '--cfg-options', *options]
    process = start('dist_train.sh', config, 2, *arguments, fresh=True)
    for line in process.stdout:
        if 'Iter(train)' in line:
            break
    everybody = descendants(process.pid)
    workers = [pid for pid in everybody if descendants(pid)]
    loaders = [pid for pid in everybody if not descendants(pid)]
    assert len(workers) == 2 and len(loaders) >= 2
    os.kill(workers[1] if victim == 'training process' else loaders[-1], signal.SIGKILL)
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert 'Signal 9' in said or 'killed by signal' in said
    wait_until(lambda: not any(map(is_running, everybody)))


def test_an_unreadable_image_ends_the_job_and_is_named(scenes, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(scenes, data)
    (data / 'images' / 'training' / 'scene_training_00003.jpg').write_bytes(b'not a picture')
    config = write_tiny_config(tmp_path, data)
    process = start('dist_train.sh', config, 2, '--work-dir', tmp_path / 'work')
    said = process.communicate(timeout=300)[0]
    assert process.returncode != 0 and 'scene_training_00003' in said


@pytest.mark.parametrize(
    'old_error',
    [
        # mmcv 1.x, parallel/distributed.py line 160, on torch >= 2.0
        "'MMDistributedDataParallel' object has no attribute '_use_replicated_tensor_module'",
        # mmcv 1.x, parallel/_functions.py line 75, on torch >= 2.0
        "'int' object has no attribute 'type'",
    ],
)
def test_what_once_needed_edits_inside_mmcv(two_processes, old_error):
    """Training forward and backward passes, and testing, inside MMDistributedDataParallel: neither error comes."""
    said, folder = two_processes
    assert 'MMDistributedDataParallel' in said and (folder / 'iter_5.pth').exists()
    assert old_error not in said


@pytest.mark.parametrize('args', [[], ['config.py'], ['config.py', 'two']])
def test_scripts_say_how_they_are_used(args):
    process = start('dist_train.sh', *args)
    assert 'usage' in process.communicate()[0] and process.returncode == 2


SRUN = """#!/usr/bin/env python3
# Stands in for Slurm's srun: starts --ntasks processes with Slurm's variables, as if typed on another node.
import os, subprocess, sys
args, tasks = sys.argv[1:], 0
while args[0].startswith('--'):
    option = args.pop(0)
    value = args.pop(0) if '=' not in option else ''
    if option == '--ntasks':
        tasks = int(value)
names = dict(SLURM_NTASKS=str(tasks), SLURM_NODELIST='node[3-4]', OMP_NUM_THREADS='1')
names['SLURM_LAUNCH_NODE_IPADDR'] = '192.0.2.1'  # a documentation's address: nobody answers there
running = [
    subprocess.Popen(args, env={**os.environ, **names, 'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)})
    for i in range(tasks)
]
sys.exit(max(process.wait() for process in running))
"""
SCONTROL = """#!/bin/sh
[ "$*" = 'show hostnames node[3-4]' ] && echo 127.0.0.1 && echo 192.0.2.2
"""


def play_slurm(folder: Path, **programs: str) -> dict[str, str]:
    """Write the programs of Slurm to a folder, and return the variables with which they are found."""
    for name, content in programs.items():
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return dict(PATH=f'{folder}:{os.environ["PATH"]}', GPUS='2', GPUS_PER_NODE='2')


def test_under_slurm(trained, tmp_path):
    """The processes meet on the first node of the job, wherever srun was typed."""
    config, checkpoint = trained
    variables = play_slurm(tmp_path, srun=SRUN, scontrol=SCONTROL)
    options = ['--work-dir', tmp_path / 'te st']
    port = dict(MASTER_PORT=free_port())
    said = run('slurm_test.sh', 'partition', 'job', config, checkpoint, *options, **variables, **port)
    alone = run_tool('test', config, checkpoint, '--work-dir', tmp_path / 'alone')
    assert metrics(said) == metrics(alone.stdout)
    options = ['--work-dir', tmp_path / 'train', '--cfg-options', 'train_cfg.max_iters=1']
    said = run('slurm_train.sh', 'partition', 'job', config, *options, **variables, MASTER_PORT=free_port())
    assert '2 processes x 2' in said and (tmp_path / 'train' / 'iter_1.pth').exists()


def test_slurm_that_does_not_tell_the_first_node(trained, tmp_path):
    variables = play_slurm(tmp_path, srun=SRUN, scontrol='#!/bin/sh\nexit 1\n')
    process = start('slurm_test.sh', 'partition', 'job', *trained, '--work-dir', tmp_path / 'work', **variables)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1 and 'error: Slurm does not tell the first node of node[3-4]' in said
    assert 'Set MASTER_ADDR' in said and 'Traceback' not in said


@pytest.mark.parametrize(('launcher', 'words'), [('slurm', 'srun .*SLURM_PROCID'), ('pytorch', 'torchrun .*RANK')])
def test_a_launcher_that_has_not_started_the_process(monkeypatch, launcher, words):
    for name in ('SLURM_PROCID', 'RANK'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=words):
        get_process_info(launcher)


@pytest.mark.parametrize('script', ['slurm_train.sh', 'slurm_test.sh'])
def test_slurm_scripts_say_how_they_are_used(script):
    process = start(script, 'partition')
    assert 'usage' in process.communicate()[0] and process.returncode == 2
