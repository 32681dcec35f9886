"""What stays on the disk and what goes over the network: no more than was asked for."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers.isolation import LOCAL
from helpers.reference import ROOT

from projects.recnext.recnext.utils.files import PARTIAL, written_beside
from projects.recnext.recnext.weights.checkpoint import read_checkpoint, write_checkpoint

STATE = dict(state_dict=dict(a=torch.ones(3)))
PACKAGE = ROOT / 'projects' / 'recnext' / 'recnext'


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_new_file_has_the_mode_of_any_other(tmp_path, umask):
    write_checkpoint(STATE, tmp_path / 'a.pth')
    assert mode_of(tmp_path / 'a.pth') == 0o666 & ~umask


@pytest.mark.parametrize('mode', [0o600, 0o640, 0o444, 0o664])
def test_a_file_that_is_written_anew_keeps_its_mode(tmp_path, mode):
    path = tmp_path / 'a.pth'
    path.write_bytes(b'old')
    path.chmod(mode)
    write_checkpoint(STATE, path)
    assert mode_of(path) == mode and torch.equal(read_checkpoint(path)['state_dict']['a'], torch.ones(3))


def test_a_folder_has_the_mode_of_any_other(tmp_path, umask):
    with written_beside(tmp_path / 'a') as beside:
        beside.mkdir()
        (beside / 'file').write_text('x')
    assert (mode_of(tmp_path / 'a'), mode_of(tmp_path / 'a' / 'file')) == (0o777 & ~umask, 0o666 & ~umask)


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('torch'), KeyboardInterrupt()])
@pytest.mark.parametrize('write', ['file', 'folder'])
def test_nothing_stays_after_a_failure(tmp_path, write, error):
    (tmp_path / 'a').write_bytes(b'old')

    with pytest.raises(UserError if isinstance(error, OSError) else type(error)) as raised:
        if write == 'file':
            with written_beside(tmp_path / 'a') as beside:
                beside.write_bytes(b'half')
                raise error
        else:
            with written_beside(tmp_path / 'b') as beside:
                beside.mkdir()
                (beside / 'half').write_text('x')
                raise error
    assert ('the disk is full' in str(raised.value)) == isinstance(error, OSError)
    assert [path.name for path in tmp_path.iterdir()] == ['a'] and (tmp_path / 'a').read_bytes() == b'old'


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path, monkeypatch):
    # In a container every process may have the number that the killed one had.
    (tmp_path / f'{PARTIAL}{os.getpid()}').mkdir()
    write_checkpoint(STATE, tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth')


def write(path, content):
    with written_beside(path) as beside:
        beside.write_bytes(content)


def test_threads_that_write_the_same_file_leave_one_of_theirs(tmp_path):
    contents = [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=write, args=(tmp_path / 'a', content)) for content in contents for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ['a'] and (tmp_path / 'a').read_bytes() in contents


CONVERT_OFTEN = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from projects.recnext.recnext.checkpoint import read_checkpoint, write_checkpoint
source, destination, number = sys.argv[1:]
content = read_checkpoint(source)
print('ready', flush=True)
sys.stdin.readline()
for _ in range(int(number)):
    write_checkpoint(content, destination)
    read_checkpoint(destination)
"""


def test_two_processes_that_write_the_same_file_do_not_corrupt_it(tmp_path):
    sources = [tmp_path / name for name in ('one.pth', 'two.pth')]
    for index, source in enumerate(sources):
        write_checkpoint(dict(state_dict=dict(a=torch.full((50_000 * (index + 1),), float(index)))), source)
    target = tmp_path / 'target.pth'
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', CONVERT_OFTEN, source, target, '40'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for source in sources
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == 'ready\n'
    for process in processes:
        process.stdin.write('\n')
        process.stdin.flush()
    # Each reads the file between its writings, whoever wrote it, and its checksums are compared.
    for process in processes:
        _, error = process.communicate()
        assert process.returncode == 0, error
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in sources}
    assert hashlib.sha256(target.read_bytes()).hexdigest() in digests
    assert sorted(path.name for path in tmp_path.iterdir()) == ['one.pth', 'target.pth', 'two.pth']


IMPORT_ALL = f"""
import importlib, json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tools')!r}]
seen = []
def note(event, arguments):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.bind', 'subprocess.Popen'):
        seen.append(f'{{event}} {{arguments[1:]}}')
sys.addaudithook(note)
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(seen))
"""


def test_importing_touches_no_network():
    modules = [f'projects.recnext.recnext.{path.stem}' for path in PACKAGE.glob('*.py') if path.stem != '__init__']
    tools = [path.stem for path in (ROOT / 'tools').glob('[a-z]*.py') if path.stem != 'test']
    result = subprocess.run([sys.executable, '-c', IMPORT_ALL, *modules, *tools], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    seen = [event for event in json.loads(result.stdout.splitlines()[-1]) if 'socket' in event]
    assert len(modules) > 40 and len(tools) > 8 and not seen


def test_the_tests_reach_no_further_than_this_machine():
    with socket.socket() as outside, pytest.raises(PermissionError, match='tests connect to this machine'):
        outside.connect(('192.0.2.1', 80))  # reserved for examples (RFC 5737)
    with pytest.raises(PermissionError, match='tests connect to this machine'):
        socket.getaddrinfo('example.com', 443)
    with socket.socket() as server, socket.socket() as client:
        server.bind((LOCAL[0], 0))
        server.listen()
        client.connect(server.getsockname())
