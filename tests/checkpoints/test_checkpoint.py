"""Reading and writing files: everything that cannot be trusted is refused by name, nothing is half written."""

import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.malicious import Command
from mmengine.logging import HistoryBuffer
from safetensors.torch import save, save_file

from projects.recnext.recnext.checkpoints.files import CheckpointError, read_checkpoint, write_checkpoint
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.files import sha256_of

STATE = {'state_dict': {'a': torch.arange(6.0).reshape(2, 3)}, 'meta': {'CLASSES': ('x', 'y'), 'epoch': 1}}


class Payload:
    """A pickle that touches a file when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize('legacy_format', [False, True], ids=['zip', 'legacy'])
def test_reads_torch_files(tmp_path, legacy_format):
    torch.save(STATE, tmp_path / 'a.pth', _use_new_zipfile_serialization=not legacy_format)
    read = read_checkpoint(tmp_path / 'a.pth')
    assert read['meta'] == STATE['meta'] and torch.equal(read['state_dict']['a'], STATE['state_dict']['a'])


def test_reads_safetensors_whatever_they_are_called(tmp_path):
    save_file(STATE['state_dict'], tmp_path / 'a.bin')
    assert torch.equal(read_checkpoint(tmp_path / 'a.bin')['a'], STATE['state_dict']['a'])


@pytest.mark.parametrize('length', [0x80, 0x4B50])
def test_reads_safetensors_whose_header_is_as_long_as_a_pickle_begins(tmp_path, length):
    content = save(STATE['state_dict'])
    header = content[8 : 8 + int.from_bytes(content[:8], 'little')].ljust(length)
    (tmp_path / 'a').write_bytes(
        length.to_bytes(8, 'little') + header + content[8 + len(header.rstrip()) :].lstrip(b' ')
    )
    assert torch.equal(read_checkpoint(tmp_path / 'a')['a'], STATE['state_dict']['a'])


def test_reads_what_mmengine_logs(tmp_path):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    extra = dict(history=buffer, number=np.float64(3), index=np.int64(2), array=np.arange(3, dtype=np.float32))
    torch.save({**STATE, **extra}, tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth')
    assert read['history'].mean() == 1.5 and read['number'] == 3 and read['array'].tolist() == [0, 1, 2]


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'pickle 2', 'pickle 4'])
@pytest.mark.parametrize('evil', [Payload, Command])
def test_malicious_pickles_are_refused_by_name_and_not_run(tmp_path, evil, kind):
    touched, path = tmp_path / 'touched', tmp_path / 'evil.pth'
    content = {**STATE, 'evil': evil(touched)}
    if kind.startswith('pickle'):
        path.write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == 'zip')
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    wanted = 'posix.system' if evil is Command else 'pathlib'
    assert 'refused' in str(error.value) and wanted in str(error.value)
    assert not touched.exists()


class Attribute:
    """A pickle that asks for an attribute of something that is allowed."""

    def __init__(self, owner: object, name: str) -> None:
        self.reached = owner, name

    def __reduce__(self):
        return getattr, self.reached


@pytest.mark.parametrize(
    ('owner', 'name'), [(HistoryBuffer, '__init__'), (HistoryBuffer, 'statistics'), (torch.Tensor, 'numpy')]
)
def test_getattr_reaches_no_further_than_the_statistics(tmp_path, owner, name):
    torch.save({**STATE, 'evil': Attribute(owner, name)}, tmp_path / 'evil.pth')
    with pytest.raises(CheckpointError, match='refused'):
        read_checkpoint(tmp_path / 'evil.pth')


def test_truncated_files(tmp_path):
    torch.save(STATE, tmp_path / 'a.pth')
    save_file(STATE['state_dict'], tmp_path / 'a.safetensors')
    for name in ('a.pth', 'a.safetensors'):
        content = (tmp_path / name).read_bytes()
        for length in (9, len(content) // 2, len(content) - 1):
            (tmp_path / 'cut').write_bytes(content[:length])
            with pytest.raises(CheckpointError, match='truncated or damaged'):
                read_checkpoint(tmp_path / 'cut')


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda p: None, 'No such checkpoint'),
        (lambda p: p.mkdir(), 'is a folder'),
        (lambda p: p.write_bytes(b''), r'empty \(0 bytes\)'),
        (lambda p: p.write_text('version https://git-lfs'), 'not a checkpoint.*version https'),
        (lambda p: torch.save([1, 2], p), 'expected a dict, found list'),
    ],
    ids=['missing', 'folder', 'empty', 'text', 'list'],
)
def test_other_things_are_named(tmp_path, make, words):
    make(tmp_path / 'it')
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / 'it')


def test_no_permission():
    # Root may read anything, so the reader's place is taken by an ordinary user for a moment.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'a.pth')
        torch.save(STATE, path)
        path.chmod(0)
        os.chmod(folder, 0o755)
        user = os.geteuid()
        try:
            if user == 0:
                os.seteuid(65534)
            with pytest.raises(CheckpointError, match='No permission'):
                read_checkpoint(path)
        finally:
            os.seteuid(user)


def test_same_content_same_bytes_whatever_the_name(tmp_path):
    write_checkpoint(STATE, tmp_path / 'a.pth')
    write_checkpoint(STATE, tmp_path / 'another-name.pth')
    assert sha256_of(tmp_path / 'a.pth') == sha256_of(tmp_path / 'another-name.pth')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.pth', 'another-name.pth']


def test_destination_must_make_sense(tmp_path):
    with pytest.raises(CheckpointError, match='No such folder'):
        write_checkpoint(STATE, tmp_path / 'nowhere' / 'a.pth')
    with pytest.raises(CheckpointError, match='is a folder'):
        write_checkpoint(STATE, tmp_path)
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(CheckpointError, match='device or the like'):
        write_checkpoint(STATE, tmp_path / 'pipe')
    assert (tmp_path / 'pipe').is_fifo() and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match='cannot be written: File name too long'):
        write_checkpoint(STATE, tmp_path / ('x' * 300))
    write_checkpoint(STATE, tmp_path / ('x' * 250))


def test_torchscript_is_told_apart(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / 'script.pt')
    with pytest.raises(CheckpointError, match='TorchScript'):
        read_checkpoint(tmp_path / 'script.pt')
