"""Downloads from a real server that misbehaves: each fault ends in the right file or in an error, and goes on later."""

import hashlib
import io
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.misbehaving import CUTS_AFTER, misbehaving_server
from helpers.reference import ROOT, config_of
from helpers.tools import assert_user_error, run_tool

from projects.recnext.recnext.checkpoints import fetch as transfer
from projects.recnext.recnext.checkpoints.fetch import ATTEMPTS, NotThereError, TransferError, fetch, fetch_checkpoint
from projects.recnext.recnext.checkpoints.files import read_checkpoint, write_checkpoint
from projects.recnext.recnext.checkpoints.releases import get_release, resolve_checkpoint
from projects.recnext.recnext.openmmlab.convert import convert_file
from projects.recnext.recnext.predict.download import addresses, download_release
from projects.recnext.recnext.utils.errors import UserError

PATIENCE = 0.4


def a_checkpoint(seed: int = 0) -> bytes:
    """A real one, of some 160 kB that do not compress."""
    stream = io.BytesIO()
    torch.save({'state_dict': {'a': torch.rand(40_000, generator=torch.Generator().manual_seed(seed))}}, stream)
    return stream.getvalue()


CONTENT, OTHER = a_checkpoint(0), a_checkpoint(1)


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr(transfer, 'FIRST_WAIT', 0.01)
    monkeypatch.setattr(transfer, 'TIMEOUT', PATIENCE)
    with misbehaving_server() as server:
        server.patience = PATIENCE
        server.files = {'/new.pth': CONTENT}
        yield server


def files(folder: Path) -> list[str]:
    """What is in a folder and on its way into it, without the locks."""
    return sorted(path.name for path in folder.rglob('*') if path.is_file() and path.suffix != '.lock')


RIGHT_AT_ONCE = {
    'cut off': ['cut'],
    'cut off again and again': ['cut'] * 3,
    'cut off before the first byte': ['cut_before_anything'] * (ATTEMPTS - 1),
    'stalled': ['stall'],
    'slow': ['trickle'],
    'busy': ['503', '429', '500', '502'],
    'progress between failures': ['503', '503', '503', 'cut', '503', '503', '503', 'cut', '503', '503'],
    'Range ignored': ['cut', 'ignore_range'],
    'Range ignored and cut off again': ['cut', 'ignore_range_and_cut', 'cut'],
    'another range than asked for': ['cut', 'another_range'],
    'range of another file': ['cut', 'other_file_ignoring_if_range'],
    'range refused': ['cut', '416'],
    'too long a length': ['too_long_a_length'],
    'chunks': ['chunked'],
    'chunks cut off': ['chunked_and_cut', 'chunked'],
    'redirected, cut off and redirected': ['redirect', 'cut', 'redirect'],
    'not HTTP': ['nonsense'],
}


@pytest.mark.parametrize('fault', RIGHT_AT_ONCE)
def test_faults_that_pass_end_in_the_right_file(server, fault):
    server.script = list(RIGHT_AT_ONCE[fault])
    place = fetch_checkpoint(f'{server.url}/{"old" if "redirect" in server.script else "new"}.pth')
    assert place.read_bytes() == CONTENT and server.script == []
    assert files(place.parent) == [place.name]


def test_what_has_arrived_is_not_fetched_again(server):
    server.script = ['cut', 'cut']
    fetch_checkpoint(f'{server.url}/new.pth')
    ranges = [(f'bytes={n * CUTS_AFTER}-', '"first"') if n else (None, None) for n in range(3)]
    assert server.requests == [('/new.pth', *asked) for asked in ranges]
    fetch_checkpoint(f'{server.url}/new.pth')
    assert len(server.requests) == 3


REFUSED = {
    'not there': (['404'], 'answers 404'),
    'gone': (['410'], 'answers 410'),
    'forbidden': (['403'], 'answers 403'),
    'always busy': (['503'] * ATTEMPTS, f'503 Service Unavailable, {ATTEMPTS} times in a row'),
    'always cut off': (['cut_before_anything'] * ATTEMPTS, 'The same command begins anew'),
    'always stalled': (
        ['cut', *['stall'] * 0, *['cut_before_anything'] * ATTEMPTS],
        f'The same command continues after {CUTS_AFTER} bytes',
    ),
    'never beyond one place': (
        ['ignore_range_and_cut'] * (ATTEMPTS + 1),
        f'ended after {CUTS_AFTER} of {len(CONTENT)}',
    ),
    'a circle': (['redirect_in_a_circle'], 'infinite loop'),
    'to a local file': (['redirect_to_a_local_file'], 'not allowed'),
    'a login page': (['html'], 'found a web page'),
    'a login page called a file': (['html_called_a_file'], 'is not a checkpoint'),
    'no length': (['no_length'], 'Content-Length'),
    'too short a length': (['too_short_a_length'], 'truncated or damaged'),
}


@pytest.mark.parametrize('fault', REFUSED)
def test_faults_that_last_end_in_an_error_and_the_next_call_in_the_right_file(server, fault):
    script, words = REFUSED[fault]
    server.script = list(script)
    with pytest.raises(UserError) as error:
        fetch_checkpoint(f'{server.url}/new.pth')
    message = str(error.value)
    assert words in message and f'{server.url}/new.pth' in message and len(message.splitlines()) < 4
    server.script.clear()
    asked = len(server.requests)
    place = fetch_checkpoint(f'{server.url}/new.pth')
    assert place.read_bytes() == CONTENT and files(place.parent) == [place.name]
    continues = 'continues after' in message
    assert [bool(wanted) for _, wanted, _ in server.requests[asked:]] == [continues]


def test_nobody_listens(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(TransferError, match='Connection refused, 5 times in a row'):
        fetch_checkpoint(f'{server.url}/new.pth')


@pytest.mark.parametrize(
    ('url', 'words'),
    [
        ('http://no-such-host.invalid/a.pth', r'cannot be downloaded: .*(Name|name|Temporary)'),
        ('gopher://127.0.0.1/a.pth', 'unknown url type'),
        ('http://127.0.0.1:notaport/a.pth', 'nonnumeric port'),
        ('file:///no/such/file.pth', 'there is no such file'),
        ('http://127.0.0.1', 'names no file'),
        ('http://127.0.0.1/folder/..', 'names no file'),
    ],
)
def test_addresses_that_lead_nowhere(server, url, words):
    with pytest.raises(UserError, match=words):
        fetch_checkpoint(url)


def test_a_file_that_changed_is_fetched_from_its_beginning(server, tmp_path):
    server.script = ['cut', *['503'] * ATTEMPTS]
    with pytest.raises(TransferError):
        fetch_checkpoint(f'{server.url}/new.pth')
    server.files['/new.pth'], server.etag = OTHER, '"second"'
    assert fetch_checkpoint(f'{server.url}/new.pth').read_bytes() == OTHER
    assert server.requests[-1] == ('/new.pth', f'bytes={CUTS_AFTER}-', '"first"')


@pytest.mark.parametrize('etag', [None, 'W/"first"'])
def test_without_a_strong_validator_nothing_is_continued(server, etag):
    server.etag, server.script = etag, ['cut']
    assert fetch_checkpoint(f'{server.url}/new.pth').read_bytes() == CONTENT
    assert [wanted for _, wanted, _ in server.requests] == [None, None]


def test_another_address_does_not_continue_what_the_first_began(server, tmp_path):
    server.files['/mirror/new.pth'] = CONTENT
    server.script = ['cut', *['503'] * ATTEMPTS]
    with pytest.raises(TransferError):
        fetch(f'{server.url}/new.pth', tmp_path / 'new.pth')
    fetch(f'{server.url}/mirror/new.pth', tmp_path / 'new.pth')
    assert (tmp_path / 'new.pth').read_bytes() == CONTENT and server.requests[-1][1] is None


def test_a_damaged_note_is_no_note(server, tmp_path):
    server.script = ['cut', *['503'] * ATTEMPTS]
    with pytest.raises(TransferError):
        fetch(f'{server.url}/new.pth', tmp_path / 'new.pth')
    (tmp_path / transfer.ARRIVING / 'new.pth.json').write_text('{"url": ')
    fetch(f'{server.url}/new.pth', tmp_path / 'new.pth')
    assert (tmp_path / 'new.pth').read_bytes() == CONTENT and server.requests[-1][1] is None


def test_arrived_whole_but_not_put_in_place(server, tmp_path):
    """Killed between the last byte and the renaming: the next call asks for nothing."""

    class Killed(BaseException):
        pass

    def killed(*paths):
        raise Killed

    with pytest.raises(Killed):
        fetch(f'{server.url}/new.pth', tmp_path / 'new.pth', killed)
    assert not (tmp_path / 'new.pth').exists() and len(server.requests) == 1
    fetch(f'{server.url}/new.pth', tmp_path / 'new.pth')
    assert (tmp_path / 'new.pth').read_bytes() == CONTENT and len(server.requests) == 1


@pytest.mark.parametrize('fault', ['none', 'chunked'])
def test_more_than_any_checkpoint_has_is_refused(server, tmp_path, monkeypatch, fault):
    """By the length that is said, and, where none is, in the middle."""
    monkeypatch.setattr(transfer, 'LARGEST', len(CONTENT) - 1)
    server.script = [fault]
    with pytest.raises(TransferError, match='is refused: more than'):
        fetch(f'{server.url}/new.pth', tmp_path / 'new.pth')
    assert [path.name for path in tmp_path.rglob('*') if path.is_file()] == ['new.pth.lock']


def test_one_name_at_two_addresses_is_two_files(server, tmp_path):
    for number in (1, 2):
        write_checkpoint({'weight': torch.tensor(number)}, tmp_path / 'of.pth')
        server.files[f'/{number}/of.pth'] = (tmp_path / 'of.pth').read_bytes()
    for number in (1, 2, 1):
        assert read_checkpoint(fetch_checkpoint(f'{server.url}/{number}/of.pth'))['weight'] == number
    assert len(server.requests) == 2


def test_a_full_disk_is_said(server, tmp_path, monkeypatch):
    if not Path('/dev/full').exists():
        pytest.skip('needs /dev/full')
    monkeypatch.setattr(transfer, '_discard', lambda path: None)
    (tmp_path / transfer.ARRIVING).mkdir()
    (tmp_path / transfer.ARRIVING / 'new.pth').symlink_to('/dev/full')
    with pytest.raises(TransferError, match=r'new\.pth cannot be written: No space left'):
        fetch(f'{server.url}/new.pth', tmp_path / 'new.pth')
    assert not (tmp_path / 'new.pth').exists()


def test_several_at_once_fetch_it_once(server, tmp_path):
    server.script = ['trickle']
    threads = [threading.Thread(target=fetch, args=(f'{server.url}/new.pth', tmp_path / 'new.pth')) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / 'new.pth').read_bytes() == CONTENT and len(server.requests) == 1


# What the tool makes of the released files.


@pytest.fixture(scope='module')
def mirror(real_m3, released, tmp_path_factory) -> Path:
    """A folder of released files: the genuine M3 as the tree of releases has it, ImageNet weights beside them."""
    folder = tmp_path_factory.mktemp('mirror')
    (folder / 'v1.0').mkdir()
    (folder / 'v1.0' / 'recnext_m3_ade20k.pth').symlink_to(real_m3)
    (folder / 'recnext_m0_distill_300e.pth').symlink_to(released('recnext_m0_distill_300e'))
    return folder


def served(server, mirror: Path) -> str:
    for path in mirror.rglob('*.pth'):
        server.files[f'/{path.relative_to(mirror)}'] = path.read_bytes()
    return server.url


def test_a_segmentor_comes_converted(server, mirror, real_m3, tmp_path):
    server.script = ['cut', '503']
    options = ['recnext_m3_ade20k', '--base-url', served(server, mirror), '--dir', tmp_path / 'here']
    result = run_tool('download_checkpoint', *options)
    assert result.returncode == 0, result.stderr
    digest = hashlib.sha256(real_m3.read_bytes()).hexdigest()
    place = tmp_path / 'here' / 'recnext_m3_ade20k.pth'
    assert str(place) in result.stdout and 'downloaded' in result.stdout and digest in result.stdout
    assert 'the connection ended after' in result.stderr and 'next attempt in' in result.stderr
    assert files(tmp_path / 'here') == ['recnext_m3_ade20k.pth', 'sha256.json']
    recorded = json.loads((tmp_path / 'here' / 'sha256.json').read_text())
    assert recorded.pop('recnext_m3_ade20k') == digest and recorded.keys() == {'recnext_m3_ade20k (weights)'}
    (tmp_path / 'again').mkdir()
    convert_file(real_m3, tmp_path / 'again' / 'm3.pth')
    ours, expected = read_checkpoint(place), read_checkpoint(tmp_path / 'again' / 'm3.pth')
    assert ours['meta']['source']['sha256'] == digest
    assert ours['state_dict'].keys() == expected['state_dict'].keys()
    assert all(torch.equal(tensor, expected['state_dict'][key]) for key, tensor in ours['state_dict'].items())
    asked = len(server.requests)
    again = download_release(get_release('recnext_m3_ade20k'), tmp_path / 'here', server.url)
    assert 'was there already' in again and len(server.requests) == asked


def test_imagenet_weights_come_as_they_are(mirror, tmp_path):
    line = download_release(get_release('recnext_m0_distill_300e'), tmp_path, str(mirror))
    assert 'downloaded' in line
    content = (mirror / 'recnext_m0_distill_300e.pth').read_bytes()
    assert (tmp_path / 'recnext_m0_distill_300e.pth').read_bytes() == content


def test_a_killed_process_is_continued(server, mirror, tmp_path):
    server.script, server.patience = ['404', 'trickle'], 0.02
    options = ['recnext_m0_distill_300e', '--base-url', served(server, mirror), '--dir', tmp_path]
    command = [sys.executable, ROOT / 'tools' / 'download_checkpoint.py', *options]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
    arriving = tmp_path / transfer.ARRIVING / 'recnext_m0_distill_300e.pth'
    while not arriving.exists() or arriving.stat().st_size < 500_000:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = arriving.stat().st_size
    result = run_tool('download_checkpoint', *options)
    assert result.returncode == 0, result.stderr
    assert server.requests[-1][1] == f'bytes={kept}-'
    assert files(tmp_path) == ['recnext_m0_distill_300e.pth', 'sha256.json']


def test_another_file_than_the_first_time_is_refused(mirror, tmp_path):
    release, here, changed = get_release('recnext_m0_distill_300e'), tmp_path / 'here', tmp_path / 'changed'
    place = here / f'{release["name"]}.pth'
    for folder in (here, changed):
        folder.mkdir()
    download_release(release, here, str(mirror))
    weights = read_checkpoint(place)
    weights['model']['head.head.linear.bias'] += 1
    torch.save(weights, changed / place.name)
    original = place.read_bytes()
    place.write_bytes((changed / place.name).read_bytes())
    with pytest.raises(UserError, match=r'is there already.*found sha256.*\n.*expected') as error:
        download_release(release, here, str(mirror))
    assert 'remove it' in str(error.value)
    place.unlink()
    with pytest.raises(UserError, match=r'found sha256.*\n.*expected') as error:
        download_release(release, here, str(changed))
    assert str(here / 'sha256.json') in str(error.value) and files(here) == ['sha256.json']
    download_release(release, here, str(mirror))
    assert place.read_bytes() == original


def test_a_file_that_is_not_what_its_name_says_is_refused(mirror, tmp_path):
    for folder in ('wrong', 'here'):
        (tmp_path / folder).mkdir()
    for name, words in (('recnext_m1_distill_300e', 'do not fit the backbone'), ('recnext_m4_ade20k', 'arch m3')):
        source = mirror / ('recnext_m0_distill_300e.pth' if 'distill' in name else 'v1.0/recnext_m3_ade20k.pth')
        (tmp_path / 'wrong' / f'{name}.pth').symlink_to(source)
        with pytest.raises(UserError, match=words) as error:
            download_release(get_release(name), tmp_path / 'here', str(tmp_path / 'wrong'))
        assert f'wrong/{name}.pth' in str(error.value)
    assert files(tmp_path / 'here') == []


def test_a_file_that_came_by_another_way_is_left_alone(mirror, tmp_path):
    place = tmp_path / 'recnext_m0_distill_300e.pth'
    place.write_bytes((mirror / place.name).read_bytes())
    assert 'nothing to compare it with' in download_release(get_release(place.stem), tmp_path, str(mirror))
    assert not (tmp_path / 'sha256.json').exists()


def test_a_damaged_record_is_said(mirror, tmp_path):
    (tmp_path / 'sha256.json').write_text('{')
    with pytest.raises(UserError, match=r'sha256\.json is no JSON'):
        download_release(get_release('recnext_m0_distill_300e'), tmp_path, str(mirror))


def test_all_of_them_are_tried(mirror, tmp_path):
    result = run_tool('download_checkpoint', '--all', '--base-url', mirror, '--dir', tmp_path / 'all')
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert '28 of 30 checkpoints failed' in result.stderr and 'v2.0/recnext_a5_ade20k.pth' not in result.stdout
    assert files(tmp_path / 'all') == ['recnext_m0_distill_300e.pth', 'recnext_m3_ade20k.pth', 'sha256.json']


@pytest.mark.parametrize('name', ['m3_ade', 'recnext_m3_ade2k', 'RecNeXt_M3_ADE20K'])
def test_close_names_are_suggested(name):
    with pytest.raises(UserError, match=r'Did you mean recnext_m3_ade20k\b'):
        get_release(name)


def test_mistakes_on_the_command_line(tmp_path):
    result = run_tool('download_checkpoint', 'recnext_m3_ade20k', '--base-url', tmp_path / 'no', '--dir', tmp_path)
    assert_user_error(result, 'there is no folder')
    for options in ([], ['recnext_m3_ade20k', '--all']):
        assert run_tool('download_checkpoint', *options, fresh=True).returncode == 2


def test_addresses():
    release = get_release('recnext_a3_ade20k')
    assert addresses(release) == [release['url']]
    mirrored = ['https://mirror.example/r/v2.0/recnext_a3_ade20k.pth', 'https://mirror.example/r/recnext_a3_ade20k.pth']
    assert addresses(release, 'https://mirror.example/r/') == mirrored


def test_a_missing_released_checkpoint_names_the_command(ade20k_sample, tmp_path):
    options = ['checkpoints/recnext_m4_ade20k.pth', '--data-root', ade20k_sample, '--work-dir', tmp_path / 'work']
    result = run_tool('test', config_of('m4'), *options)
    assert_user_error(result, 'python tools/download_checkpoint.py recnext_m4_ade20k\n', 'v1.0/recnext_m4_ade20k.pth)')
    with pytest.raises(UserError, match=r'download_checkpoint\.py recnext_m4_ade20k --dir else/where\n'):
        resolve_checkpoint('else/where/recnext_m4_ade20k.pth')


def test_not_there_is_told_from_other_errors(server):
    with pytest.raises(NotThereError):
        fetch_checkpoint(f'{server.url}/nothing.pth')
