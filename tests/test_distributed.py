"""Several real processes without a GPU: the same numbers, the same weights, and an end to everything when one dies."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, config_of, run_tool
from PIL import Image
from tiny import write_tiny_config

from projects.recnext.recnext.checkpoint import read_checkpoint
from projects.recnext.recnext.sample_scenes import write_dataset

ENVIRONMENT = {**os.environ, 'PYTHON': sys.executable}


def start(script: str, *args: object, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        ['bash', str(ROOT / 'tools' / script), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**ENVIRONMENT, **variables},
        start_new_session=True,
    )  # fmt: skip


def run(script: str, *args: object, **variables: str) -> str:
    process = start(script, *args, **variables)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    return said


def metrics(said: str) -> list[str]:
    """Everything that was measured, to the last digit: the table of classes and the summary."""
    lines = said.splitlines()
    table = [line for line in lines if re.match(r'\| +\S', line)]
    return [*table, re.search(r'aAcc.*mAcc: [\d.]+', said)[0]]


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


@pytest.mark.parametrize('processes', [1, 2, 3])
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


def test_the_real_images_in_two_processes(real_m3, ade20k_sample, tmp_path):
    options = ['--data-root', ade20k_sample, '--work-dir', tmp_path]
    said = run('dist_test.sh', config_of('m3'), real_m3, 2, *options)
    assert 'aAcc: 88.6900  mIoU: 38.6000  mAcc: 46.7300' in said


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
    said = run('dist_train.sh', config, 2, '--work-dir', folder / 'work', '--cfg-options', *options)
    return said, folder / 'work'


def test_two_processes_of_two_images_train_as_one_of_four(two_processes, scenes, tmp_path):
    said, folder = two_processes
    assert '4 images an iteration (2 processes x 2)' in said and 'As in the recipe' in said and 'mIoU' in said
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


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return str(listener.getsockname()[1])


def test_two_machines_on_one(trained, tmp_path):
    config, checkpoint = trained
    where = dict(NNODES='2', MASTER_ADDR='127.0.0.1')
    for script, args, done in (
        ('dist_test.sh', [config, checkpoint, 1, '--work-dir', tmp_path / 'test'], 'mIoU'),
        (
            'dist_train.sh',
            [config, 1, '--work-dir', tmp_path / 'train', '--cfg-options', 'train_cfg.max_iters=2'],
            '[2/2]',
        ),
    ):
        port = free_port()
        machines = [start(script, *args, **where, PORT=port, NODE_RANK=str(rank)) for rank in (0, 1)]
        said = [machine.communicate(timeout=300)[0] for machine in machines]
        assert [machine.returncode for machine in machines] == [0, 0], said
        assert done in said[0]
    assert (tmp_path / 'train' / 'iter_2.pth').exists()


def processes_of(group: int) -> list[int]:
    listing = subprocess.run(['ps', '-eo', 'pid,pgid,sid,stat'], capture_output=True, text=True).stdout.splitlines()[1:]
    rows = [line.split() for line in listing]
    return [int(pid) for pid, _, session, state in rows if int(session) == group and 'Z' not in state]


def test_one_process_killed_ends_them_all(scenes, tmp_path):
    config = write_tiny_config(tmp_path, scenes)
    args = [config, 2, '--work-dir', tmp_path / 'work', '--cfg-options', 'train_cfg.max_iters=100000']
    process = start('dist_train.sh', *args)
    for line in process.stdout:
        if 'Iter(train)' in line:
            break
    listing = subprocess.run(['ps', '-eo', 'pid,sid,args'], capture_output=True, text=True).stdout.splitlines()
    rows = [line.split(maxsplit=2) for line in listing[1:]]
    mine = [(int(pid), args) for pid, session, args in rows if session == str(process.pid)]
    workers = [pid for pid, args in mine if 'tools/train.py' in args and 'torch.distributed.run' not in args]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and time.monotonic() - began < 30
    assert 'Signal 9' in said
    assert processes_of(process.pid) == []


def test_an_unreadable_image_ends_the_job_and_is_named(scenes, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(scenes, data)
    (data / 'images' / 'training' / 'scene_training_00003.jpg').write_bytes(b'not a picture')
    config = write_tiny_config(tmp_path, data)
    process = start('dist_train.sh', config, 2, '--work-dir', tmp_path / 'work')
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and 'scene_training_00003' in said
    assert processes_of(process.pid) == []


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
