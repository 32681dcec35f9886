"""Downloads from a real server that misbehaves: each fault ends in the right file or in an error of a few lines."""

import hashlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.misbehaving import misbehaving_server
from helpers.reference import ROOT, config_of
from helpers.tools import assert_user_error, run_tool, wait_until

from projects.recnext.recnext.checkpoints.convert import convert_file
from projects.recnext.recnext.checkpoints.download import download_release
from projects.recnext.recnext.checkpoints.fetch import RETRIES, NotThereError, TransferError, fetch_checkpoint
from projects.recnext.recnext.checkpoints.files import CheckpointError, read_checkpoint, write_checkpoint
from projects.recnext.recnext.checkpoints.releases import get_release, resolve_checkpoint
from projects.recnext.recnext.cli.options import names_weights
from projects.recnext.recnext.utils.errors import UserError

M0, M3 = 'recnext_m0_distill_300e', 'recnext_m3_ade20k'


def a_checkpoint() -> bytes:
    """A real one, of some 160 kB that do not compress."""
    stream = io.BytesIO()
    torch.save({'state_dict': {'a': torch.rand(40_000, generator=torch.Generator().manual_seed(0))}}, stream)
    return stream.getvalue()


CONTENT = a_checkpoint()


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    with misbehaving_server() as server:
        server.files = {'/new.pth': CONTENT}
        yield server


def files(folder: Path) -> list[str]:
    """What is in a folder and on its way into it, without the locks."""
    return sorted(path.name for path in folder.rglob('*') if path.is_file() and path.name != 'lock')


RIGHT_AT_ONCE = {
    'cut off': ['cut'],
    'cut off before the first byte': ['cut_before_anything'],
    'busy': ['503'],
    'too many requests': ['429'],
    'slow': ['trickle'],
    'chunks': ['chunked'],
    'chunks cut off': ['chunked_and_cut'],
    'no length': ['without_length'],
    'redirected': ['redirect'],
    'not HTTP': ['nonsense'],
}


@pytest.mark.parametrize('fault', RIGHT_AT_ONCE)
def test_faults_that_pass_end_in_the_right_file(server, fault):
    server.script = list(RIGHT_AT_ONCE[fault])
    url = f'{server.url}/{"old" if "redirect" in server.script else "new"}.pth'
    path = fetch_checkpoint(url)
    assert path.read_bytes() == CONTENT and files(path.parent) == [path.name]
    asked = len(server.requests)
    assert fetch_checkpoint(url) == path and len(server.requests) == asked


REFUSED = {
    'not there': (['404'], 'answers 404'),
    'gone': (['410'], 'answers 410'),
    'forbidden': (['403'], 'answers 403'),
    'always busy': (['503'] * (RETRIES + 1), '503'),
    'always cut off': (['cut'] * (RETRIES + 1), 'IncompleteRead'),
    'a circle': (['redirect_in_a_circle'] * (RETRIES + 1), 'redirects'),
    'to a local file': (['redirect_to_a_local_file'] * (RETRIES + 1), 'file:///etc/hostname'),
    'a login page': (['html'], 'found a web page'),
    'a login page called a file': (['html_called_a_file'], 'is not a checkpoint'),
    'cut off, without a length': (['without_length_and_cut'], 'truncated or damaged'),
    'too short a length': (['too_short_a_length'], 'truncated or damaged'),
}


@pytest.mark.every(2)
@pytest.mark.parametrize('fault', REFUSED)
def test_faults_that_last_end_in_an_error_and_the_next_call_in_the_right_file(server, tmp_path, fault):
    script, words = REFUSED[fault]
    server.script = list(script)
    with pytest.raises(UserError) as error:
        fetch_checkpoint(f'{server.url}/new.pth')
    message = str(error.value)
    assert words in message and f'{server.url}/new.pth' in message and len(message.splitlines()) == 1
    assert isinstance(error.value, NotThereError) == (fault in ('not there', 'gone'))
    assert files(tmp_path) == []
    server.script.clear()
    assert fetch_checkpoint(f'{server.url}/new.pth').read_bytes() == CONTENT


def test_nobody_listens(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(TransferError, match=r'new\.pth cannot be downloaded: .*Connection refused'):
        fetch_checkpoint(f'{server.url}/new.pth')


@pytest.mark.parametrize(
    ('url', 'words'),
    [
        ('gopher://127.0.0.1/a.pth', 'begins with https://'),
        ('http://127.0.0.1:notaport/a.pth', 'cannot be downloaded: .*port'),
        ('http://127.0.0.1', 'names no file'),
        ('http://127.0.0.1/folder/..', 'names no file'),
    ],
)
def test_addresses_that_lead_nowhere(url, words):
    with pytest.raises(UserError, match=words):
        fetch_checkpoint(url)


def test_an_address_with_a_query_is_one_of_weights(server):
    """As the hub's "copy link" gives it."""
    assert names_weights('https://huggingface.co/a/b/resolve/main/model.pth?download=true')
    assert names_weights('runs/iter_1.pth') and names_weights('~/model.safetensors')
    for image in ('https://example.org/photo.jpg?like=model.pth', 'https://model.pth/photo', 'photo?.jpg', 'a.pth/b'):
        assert not names_weights(image)
    assert resolve_checkpoint(f'{server.url}/new.pth?download=true').name == 'new.pth'
    assert server.requests == ['/new.pth?download=true']


def test_a_home_and_a_file_address_are_paths(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    path = tmp_path / 'my w.pth'
    path.write_bytes(CONTENT)
    assert resolve_checkpoint('~/my w.pth') == resolve_checkpoint(path.as_uri()) == path
    with pytest.raises(CheckpointError, match=r'No such checkpoint: ~/none\.pth'):
        resolve_checkpoint('~/none.pth')


def test_one_name_at_two_addresses_is_two_files(server, tmp_path):
    for number in (1, 2):
        write_checkpoint({'weight': torch.tensor(number)}, tmp_path / 'of.pth')
        server.files[f'/{number}/of.pth'] = (tmp_path / 'of.pth').read_bytes()
    for number in (1, 2, 1):
        assert read_checkpoint(fetch_checkpoint(f'{server.url}/{number}/of.pth'))['weight'] == number
    assert len(server.requests) == 2


FETCH = (
    'import sys; from projects.recnext.recnext.checkpoints.fetch import fetch_checkpoint as f; print(f(sys.argv[1]))'
)


def fetch_in_a_process(url: str) -> subprocess.Popen:
    command = [sys.executable, '-c', FETCH, url]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_two_processes_at_once_fetch_it_once(server):
    server.script = ['trickle']
    processes = [fetch_in_a_process(f'{server.url}/new.pth') for _ in range(2)]
    said = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(said) == 1
    assert Path(said.pop()).read_bytes() == CONTENT and len(server.requests) == 1


def test_a_killed_process_leaves_nothing_under_the_name(server, tmp_path):
    server.script, server.seconds = ['trickle'], 60
    process = fetch_in_a_process(f'{server.url}/new.pth')
    wait_until(lambda: server.requests and any(tmp_path.rglob('.partial-*/*')))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 'new.pth' not in files(tmp_path) and files(tmp_path) != []
    path = fetch_checkpoint(f'{server.url}/new.pth')
    assert path.read_bytes() == CONTENT and files(tmp_path) == ['new.pth']


def test_a_folder_that_cannot_be_made_is_said(server, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'file'))
    with pytest.raises(UserError, match='cannot be made a folder'):
        fetch_checkpoint(f'{server.url}/new.pth')
    assert server.requests == []


# What the tool makes of the released files.


@pytest.fixture(scope='module')
def mirror(real_m3, released, tmp_path_factory) -> Path:
    """A folder of released files: the genuine M3 as the tree of releases has it, ImageNet weights beside them."""
    folder = tmp_path_factory.mktemp('mirror')
    (folder / 'v1.0').mkdir()
    (folder / 'v1.0' / f'{M3}.pth').symlink_to(real_m3)
    (folder / f'{M0}.pth').symlink_to(released(M0))
    return folder


def test_a_segmentor_comes_converted_and_its_digest_is_recorded(server, mirror, real_m3, tmp_path):
    for path in mirror.rglob('*.pth'):
        server.files[f'/{path.relative_to(mirror)}'] = path.read_bytes()
    server.script = ['cut', '503']
    result = run_tool('download_checkpoint', M3, '--base-url', server.url, '--dir', tmp_path / 'here')
    assert result.returncode == 0, result.stderr
    digest = hashlib.sha256(real_m3.read_bytes()).hexdigest()
    path = tmp_path / 'here' / f'{M3}.pth'
    # Nothing was published to compare it with, and nothing else is said.
    assert f'{path}, 48.3 MB, downloaded; sha256 of the released file: {digest}, recorded now' in result.stdout
    assert files(tmp_path / 'here') == [path.name, 'sha256.json']
    recorded = json.loads((tmp_path / 'here' / 'sha256.json').read_text())
    assert recorded.pop(M3) == digest and recorded.keys() == {f'{M3} (weights)'}
    (tmp_path / 'again').mkdir()
    convert_file(real_m3, tmp_path / 'again' / path.name)
    ours, expected = read_checkpoint(path), read_checkpoint(tmp_path / 'again' / path.name)
    assert ours['meta'] == {**expected['meta'], 'source': {**expected['meta']['source'], 'file': path.name}}
    assert ours['state_dict'].keys() == expected['state_dict'].keys()
    assert all(torch.equal(tensor, expected['state_dict'][key]) for key, tensor in ours['state_dict'].items())
    asked = len(server.requests)
    again = download_release(get_release(M3), tmp_path / 'here', server.url)
    assert 'was there already' in again and 'equal to the one recorded at the first' in again
    assert len(server.requests) == asked
    path.unlink()
    assert 'downloaded; ' in (line := download_release(get_release(M3), tmp_path / 'here', server.url))
    assert line.endswith('equal to the one recorded at the first download')


def test_imagenet_weights_come_as_they_are_and_another_file_later_is_refused(mirror, tmp_path):
    release, here, changed = get_release(M0), tmp_path / 'here', tmp_path / 'changed'
    path = here / f'{M0}.pth'
    assert 'recorded now' in download_release(release, here, str(mirror))
    original = (mirror / path.name).read_bytes()
    assert path.read_bytes() == original and not path.is_symlink()
    weights = read_checkpoint(path)
    weights['model']['head.head.linear.bias'] += 1
    changed.mkdir()
    torch.save(weights, changed / path.name)
    path.write_bytes((changed / path.name).read_bytes())
    with pytest.raises(UserError, match=r'is there already.*found sha256.*\n.*expected') as error:
        download_release(release, here, str(mirror))
    assert 'remove it' in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match=r'found sha256.*\n.*expected') as error:
        download_release(release, here, str(changed))
    assert str(here / 'sha256.json') in str(error.value) and files(here) == ['sha256.json']
    download_release(release, here, str(mirror))
    assert path.read_bytes() == original


def test_a_file_that_is_not_what_its_name_says_is_refused(mirror, tmp_path):
    (tmp_path / 'wrong').mkdir()
    for name, source, words in (
        ('recnext_m1_distill_300e', f'{M0}.pth', 'The file is m0, the network m1'),
        ('recnext_m4_ade20k', f'v1.0/{M3}.pth', 'The file is m3, the network m4'),
    ):
        (tmp_path / 'wrong' / f'{name}.pth').symlink_to(mirror / source)
        with pytest.raises(UserError, match=words) as error:
            download_release(get_release(name), tmp_path / 'here', str(tmp_path / 'wrong'))
        assert name in str(error.value)
    assert files(tmp_path / 'here') == []


def test_a_file_that_came_by_another_way_is_left_alone(mirror, tmp_path):
    path = tmp_path / f'{M0}.pth'
    path.write_bytes((mirror / path.name).read_bytes())
    assert 'compared with nothing' in download_release(get_release(M0), tmp_path, str(mirror))
    assert not (tmp_path / 'sha256.json').exists()


def test_all_of_them_are_tried(mirror, tmp_path):
    result = run_tool('download_checkpoint', '--all', '--base-url', mirror, '--dir', tmp_path / 'all')
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert '28 of 30 checkpoints failed' in result.stderr
    assert files(tmp_path / 'all') == [f'{M0}.pth', f'{M3}.pth', 'sha256.json']


@pytest.mark.parametrize('name', ['m3_ade', 'recnext_m3_ade2k', 'RecNeXt_M3_ADE20K'])
def test_close_names_are_suggested(name):
    with pytest.raises(UserError, match=r'Did you mean recnext_m3_ade20k\b'):
        get_release(name)


def test_mistakes_on_the_command_line(tmp_path):
    result = run_tool('download_checkpoint', M3, '--base-url', tmp_path / 'no', '--dir', tmp_path)
    assert_user_error(result, 'there is no folder')
    for options in ([], [M3, '--all']):
        assert run_tool('download_checkpoint', *options, fresh=True).returncode == 2


def test_a_missing_released_checkpoint_names_the_command(ade20k_sample, tmp_path):
    options = ['checkpoints/recnext_m4_ade20k.pth', '--data-root', ade20k_sample, '--work-dir', tmp_path / 'work']
    result = run_tool('test', config_of('m4'), *options)
    assert_user_error(result, 'download_checkpoint.py recnext_m4_ade20k\n', 'v1.0/recnext_m4_ade20k.pth)')
    with pytest.raises(UserError, match=r'download_checkpoint\.py recnext_m4_ade20k --dir else/where\n'):
        resolve_checkpoint('else/where/recnext_m4_ade20k.pth')
