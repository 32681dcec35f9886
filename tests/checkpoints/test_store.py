"""Checkpoints at an address: real trainings that write there, and go on elsewhere from what is there."""

import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import torch
from helpers.reference import ROOT
from helpers.tiny import write_tiny_config

from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.openmmlab.train import TrainOptions
from projects.recnext.recnext.openmmlab.train import train as run_train
from projects.recnext.recnext.utils.errors import UserError

WITHOUT_VALIDATION = """
val_cfg = val_dataloader = val_evaluator = None
"""


@pytest.fixture(params=['memory', 's3', *(pytest.param(kind, marks=pytest.mark.full) for kind in ('folder', 'file'))])
def url(request, tmp_path) -> str:
    if request.param == 's3':
        return f'{request.getfixturevalue("s3")}/{tmp_path.name}/deep'
    if request.param == 'memory':
        return f'memory://{tmp_path.name}/deep'
    folder = tmp_path / 'store' / 'deep'
    return folder.as_uri() if request.param == 'file' else str(folder)


@pytest.fixture(scope='module')
def s3(tmp_path_factory) -> str:
    """A bucket of a real S3 server on this machine, by moto."""
    pytest.importorskip('s3fs')
    server = pytest.importorskip('moto.server').ThreadedMotoServer(ip_address='127.0.0.1', port=0)
    server.start()
    address = f'http://127.0.0.1:{server.get_host_and_port()[1]}'
    settings = dict(
        AWS_ENDPOINT_URL=address, AWS_ACCESS_KEY_ID='x', AWS_SECRET_ACCESS_KEY='x', AWS_DEFAULT_REGION='us-east-1'
    )
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    fsspec.filesystem('s3').mkdir('bucket')
    yield 's3://bucket'
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def train(config: Path, work_dir: Path, resume: str | None = None, **options) -> None:
    run_train(str(config), TrainOptions(str(work_dir), resume, **options))


def list_names(url: str) -> list[str]:
    fs, root = fsspec.url_to_fs(url)
    return sorted(path.removeprefix(root).lstrip('/') for path in fs.find(root))


def test_a_run_goes_on_where_its_work_dir_is_not(url, scenes, tmp_path):
    """From the newest of the store, exactly; what training removes goes from there too."""
    config = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION)
    here, elsewhere = tmp_path / 'here' / 'run', tmp_path / 'elsewhere' / 'run'
    options = {'default_hooks.checkpoint.max_keep_ckpts': 2}
    train(config, here, store=url, cfg_options={**options, 'train_cfg.max_iters': 3})
    assert list_names(f'{url}/run') == ['iter_2.pth', 'iter_3.pth'] and not list(here.rglob('*.pth'))
    # An older one in the work dir does not count; the address may stand in the config as well.
    elsewhere.mkdir(parents=True)
    torch.save({}, elsewhere / 'iter_1.pth')
    in_config = {'default_hooks.checkpoint.out_dir': url, 'train_cfg.max_iters': 4}
    train(config, elsewhere, 'auto', cfg_options={**options, **in_config})
    assert list_names(f'{url}/run') == ['iter_3.pth', 'iter_4.pth']
    train(config, tmp_path / 'alone', cfg_options={'train_cfg.max_iters': 4})
    fs, root = fsspec.url_to_fs(f'{url}/run')
    fs.get_file(f'{root}/iter_4.pth', str(tmp_path / 'back.pth'))
    ours, theirs = (
        read_checkpoint(path)['state_dict'] for path in (tmp_path / 'back.pth', tmp_path / 'alone/iter_4.pth')
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    # From the weights alone, and from a checkpoint that is named.
    address = f'{url}/run/iter_4.pth'
    train(config, tmp_path / 'new', cfg_options={'load_from': address, 'train_cfg.max_iters': 1})
    train(config, tmp_path / 'on', address, cfg_options={'train_cfg.max_iters': 5})
    assert (tmp_path / 'new' / 'iter_1.pth').exists()
    assert [path.name for path in (tmp_path / 'on').glob('*.pth')] == ['iter_5.pth']


def test_a_newer_checkpoint_of_the_work_dir_counts(scenes, tmp_path):
    config, url = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION), f'memory://{tmp_path.name}'
    train(config, tmp_path / 'run', store=url, cfg_options={'train_cfg.max_iters': 1})
    train(config, tmp_path / 'run', cfg_options={'train_cfg.max_iters': 2})
    train(config, tmp_path / 'run', 'auto', store=url, cfg_options={'train_cfg.max_iters': 3})
    assert list_names(f'{url}/run') == ['iter_1.pth', 'iter_3.pth'] and not (tmp_path / 'run' / '.store').exists()


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(store='nonsense://x'), 'nonsense://x cannot be used: ValueError: .*nonsense'),
        (dict(store='s3://no-such-bucket/x'), 's3a://no-such-bucket/x cannot be used: .*bucket'),
        (dict(resume='memory://nothing/iter_1.pth'), 'memory://nothing/iter_1.pth cannot be used: FileNotFoundError'),
        (dict(cfg_options=dict(load_from='memory://nothing/a.pth')), 'memory://nothing/a.pth cannot be used'),
    ],
)
def test_a_store_that_cannot_be_used_is_said_before_training(scenes, tmp_path, request, settings, words):
    if settings.get('store', '').startswith('s3'):
        request.getfixturevalue('s3')
    with pytest.raises(UserError, match=words) as error:
        train(write_tiny_config(tmp_path, scenes), tmp_path / 'work', **settings)
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / 'work').exists()


def test_a_store_that_may_not_be_written(scenes, tmp_path):
    (tmp_path / 'store').write_text('a file in the way')
    with pytest.raises(UserError, match='store cannot be used: '):
        train(write_tiny_config(tmp_path, scenes), tmp_path / 'w', store=(tmp_path / 'store').as_uri())


def test_importing_leaves_mmengines_file_io_alone():
    code = """
from mmengine.fileio import FileClient
from mmengine.fileio.backends import backends, prefix_to_backends
places = backends, prefix_to_backends, FileClient._backends, FileClient._prefix_to_backends
before = [dict(place) for place in places]
import projects.recnext.recnext.openmmlab.train
for had, place in zip(before, places):
    assert all(place[name] is backend for name, backend in had.items()) and 'fsspec' not in place
"""
    said = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert said.returncode == 0, said.stderr


def test_a_config_that_a_run_has_dumped_writes_to_the_store_as_well(scenes, tmp_path):
    config = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION)
    train(config, tmp_path / 'work', cfg_options={'train_cfg.max_iters': 1})
    url = (tmp_path / 'store').as_uri()
    train(tmp_path / 'work' / config.name, tmp_path / 'again', store=url, cfg_options={'train_cfg.max_iters': 1})
    assert 'again/iter_1.pth' in list_names(url)
