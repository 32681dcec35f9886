"""Checkpoints and logs in another place: whole for who reads there, and no reason to end training."""

import os
from pathlib import Path

import pytest
import torch
from helpers.tiny import write_tiny_config

from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.openmmlab import store as store_module
from projects.recnext.recnext.openmmlab.store import Store, share_newest_checkpoint
from projects.recnext.recnext.openmmlab.train import TrainOptions
from projects.recnext.recnext.openmmlab.train import train as run_train
from projects.recnext.recnext.utils.errors import PassingError, UserError

fsspec = pytest.importorskip('fsspec')

WITHOUT_VALIDATION = """
val_cfg = val_dataloader = val_evaluator = None
"""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(store_module, 'FIRST_PAUSE', 0)


@pytest.fixture(params=['folder', 'memory', 's3'])
def url(request, tmp_path) -> str:
    if request.param == 's3':
        return f'{request.getfixturevalue("s3")}/{request.node.name.replace("[", "-").replace("]", "")}/deep'
    return str(tmp_path / 'store' / 'deep') if request.param == 'folder' else f'memory://{tmp_path.name}/deep'


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


def write(path: Path, number: int) -> Path:
    torch.save(dict(number=torch.tensor(number), state_dict={}), path)
    return path


def test_files_go_there_and_back(url, tmp_path):
    store = Store(url)
    assert store.list_names() == set()
    path = write(tmp_path / 'iter_1.pth', 1)
    store.put(path, 'iter_1.pth')
    store.put(path, 'logs/today/log.txt')
    store.put(write(tmp_path / 'iter_1.pth', 2), 'iter_1.pth')  # in the place of the other
    assert store.list_names() - {'logs'} == {'iter_1.pth'}
    store.get('iter_1.pth', tmp_path / 'back.pth')
    assert (tmp_path / 'back.pth').read_bytes() == path.read_bytes()
    store.remove('iter_1.pth')
    store.remove('iter_1.pth')
    assert store.list_names() - {'logs'} == set()


def test_the_newest_is_shared(url, tmp_path):
    store, ours, others = Store(url), tmp_path / 'ours', tmp_path / 'others'
    share_newest_checkpoint(store, str(ours))  # none anywhere
    write(ours / 'iter_9.pth', 9)
    (write(ours / 'iter_10.pth', 10)).write_bytes(b'PK\x03\x04 damaged')
    share_newest_checkpoint(store, str(ours))
    assert store.list_names() == {'iter_9.pth'}
    share_newest_checkpoint(store, str(others))
    assert read_checkpoint(others / 'iter_9.pth')['number'] == 9
    store.put(write(tmp_path / 'x', 12), 'iter_12.pth')
    share_newest_checkpoint(store, str(ours))
    assert read_checkpoint(ours / 'iter_12.pth')['number'] == 12


def test_a_reader_never_sees_half(tmp_path, monkeypatch):
    store = Store(str(tmp_path / 'store'))
    store.put(write(tmp_path / 'a.pth', 1), 'a.pth')
    whole = (tmp_path / 'store' / 'a.pth').read_bytes()

    def cut_off(source, place, **kwargs):
        Path(place).write_bytes(b'half')
        raise ConnectionResetError('cut off')

    monkeypatch.setattr(store._fs, 'put_file', cut_off)
    with pytest.raises(PassingError, match=r'cannot be written: ConnectionResetError: cut off \(4 times\)'):
        store.put(write(tmp_path / 'a.pth', 2), 'a.pth')
    assert [path.name for path in (tmp_path / 'store').iterdir()] == ['a.pth']
    assert (tmp_path / 'store' / 'a.pth').read_bytes() == whole


def test_errors_of_the_network_are_tried_again(tmp_path, monkeypatch):
    store, put, left = Store(str(tmp_path / 'store')), None, [TimeoutError(), ConnectionError()]
    put = store._fs.put_file
    monkeypatch.setattr(store._fs, 'put_file', lambda *paths: raise_next(left) if left else put(*paths))
    store.put(write(tmp_path / 'a.pth', 1), 'a.pth')
    assert (tmp_path / 'store' / 'a.pth').exists()


def raise_next(left: list[Exception]) -> None:
    raise left.pop()


@pytest.mark.parametrize('address, words', [('nonsense://x', 'nonsense'), ('s3://no-such-bucket/x', 'no-such-bucket')])
def test_a_store_that_is_not_there_ends_the_run_before_it_begins(scenes, tmp_path, request, address, words):
    if address.startswith('s3'):
        request.getfixturevalue('s3')
    with pytest.raises(UserError, match=words) as error:
        run_train(str(write_tiny_config(tmp_path, scenes)), TrainOptions(str(tmp_path / 'work'), store=address))
    assert error.value.final and not list((tmp_path / 'work').glob('*.pth'))


@pytest.mark.full
@pytest.mark.parametrize('url', ['folder', 's3', 'memory'], indirect=True)
def test_a_run_that_goes_on_elsewhere(url, scenes, tmp_path):
    """Checkpoints, logs and config are in the store; a machine with an empty work dir goes on from there, exactly."""
    config = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION)
    run_train(str(config), TrainOptions(str(tmp_path / 'one'), store=url, cfg_options={'train_cfg.max_iters': 2}))
    here = {path.relative_to(tmp_path / 'one').as_posix() for path in (tmp_path / 'one').rglob('*') if path.is_file()}
    fs, root = fsspec.core.url_to_fs(url)
    there = {path.removeprefix(root).lstrip('/') for path in fs.find(root)}
    assert there == here and 'iter_2.pth' in there and any(name.endswith('scalars.json') for name in there)
    run_train(
        str(config), TrainOptions(str(tmp_path / 'two'), 'auto', store=url, cfg_options={'train_cfg.max_iters': 3})
    )
    assert not (tmp_path / 'two' / 'iter_1.pth').exists()
    run_train(str(config), TrainOptions(str(tmp_path / 'three'), cfg_options={'train_cfg.max_iters': 3}))
    (tmp_path / 'back').mkdir()
    Store(url).get('iter_3.pth', tmp_path / 'back' / 'iter_3.pth')
    ours, theirs = (read_checkpoint(tmp_path / work / 'iter_3.pth')['state_dict'] for work in ('back', 'three'))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_lost_copy_does_not_end_training_and_is_made_up_for(scenes, tmp_path, monkeypatch, caplog):
    put, calls = Store._put, []

    def fail_at_first(self, path, place):
        calls.append(path.name)
        if path.name == 'iter_1.pth' and calls.count('iter_1.pth') <= store_module.TRIES:
            raise ConnectionError('no route')
        put(self, path, place)

    monkeypatch.setattr(Store, '_put', fail_at_first)
    config = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION)
    run_train(
        str(config),
        TrainOptions(str(tmp_path / 'work'), store=str(tmp_path / 'store'), cfg_options={'train_cfg.max_iters': 3}),
    )
    said = next((tmp_path / 'work').glob('*/*.log')).read_text()
    assert said.count('cannot be written: ConnectionError: no route (4 times) Training goes on') == 1
    for number in (1, 2, 3):
        name = f'iter_{number}.pth'
        assert (tmp_path / 'store' / name).read_bytes() == (tmp_path / 'work' / name).read_bytes()


def test_what_training_removes_goes_from_the_store_too(scenes, tmp_path):
    config = write_tiny_config(tmp_path, scenes, WITHOUT_VALIDATION)
    options = {'train_cfg.max_iters': 4, 'default_hooks.checkpoint.max_keep_ckpts': 2}
    run_train(str(config), TrainOptions(str(tmp_path / 'work'), store=str(tmp_path / 'store'), cfg_options=options))
    assert sorted(path.name for path in (tmp_path / 'store').glob('*.pth')) == ['iter_3.pth', 'iter_4.pth']
