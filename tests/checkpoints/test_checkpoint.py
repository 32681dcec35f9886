"""Reading and writing files: every container is read, and nothing is half written."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save, save_file

from projects.recnext.recnext.checkpoints.files import CheckpointError, read_checkpoint, write_checkpoint
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.files import sha256_of

STATE = {'state_dict': {'a': torch.arange(6.0).reshape(2, 3)}, 'meta': {'CLASSES': ('x', 'y'), 'epoch': 1}}


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
    read_checkpoint(tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth', history=HistoryBuffer)
    assert read['history'].mean() == 1.5 and read['number'] == 3 and read['array'].tolist() == [0, 1, 2]


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
