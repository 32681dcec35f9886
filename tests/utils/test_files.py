"""Files are written whole or not at all, whoever else writes, and whatever goes wrong."""

import errno
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.disks import small_disk_at
from helpers.reference import ROOT
from helpers.tiny import write_tiny
from helpers.tools import assert_user_error, run_tool
from matplotlib.figure import Figure
from mmengine.fileio import put
from PIL import Image
from safetensors.torch import save_file

from projects.recnext.recnext.checkpoints.files import read_checkpoint, write_checkpoint, write_safetensors
from projects.recnext.recnext.predict.model import load_deployed
from projects.recnext.recnext.predict.video import predict_video
from projects.recnext.recnext.samples.objects import write_objects
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.files import PARTIAL, atomic_write

STATE = dict(state_dict=dict(a=torch.ones(3)))


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
    with atomic_write(tmp_path / 'a') as beside:
        beside.mkdir()
        (beside / 'file').write_text('x')
    assert (mode_of(tmp_path / 'a'), mode_of(tmp_path / 'a' / 'file')) == (0o777 & ~umask, 0o666 & ~umask)


@pytest.mark.parametrize(
    'error',
    [RuntimeError('torch'), KeyError('a'), FileNotFoundError(2, 'No such file', 'another'), KeyboardInterrupt()],
)
@pytest.mark.parametrize('write', ['file', 'folder'])
def test_after_an_error_of_another_kind_nothing_stays_and_it_is_passed_on(tmp_path, write, error):
    (tmp_path / 'a').write_bytes(b'old')
    with pytest.raises(type(error)) as raised, atomic_write(tmp_path / ('a' if write == 'file' else 'b')) as beside:
        if write == 'folder':
            beside.mkdir()
        (beside / 'half' if write == 'folder' else beside).write_bytes(b'half')
        raise error
    assert raised.value is error
    assert [path.name for path in tmp_path.iterdir()] == ['a'] and (tmp_path / 'a').read_bytes() == b'old'


# --- A full disk ---

SIZE = 2**20


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a megabyte with two files on it, and room for small ones."""
    folder = tmp_path / 'disk'
    with small_disk_at(folder, SIZE):
        (folder / 'a.pth').write_bytes(b'old')
        (folder / 'other').write_bytes(bytes(SIZE * 7 // 8))
        yield folder


def assert_as_before(disk):
    assert sorted(path.name for path in disk.iterdir()) == ['a.pth', 'other']
    assert (disk / 'a.pth').read_bytes() == b'old'


NOISE = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
TENSORS = dict(a=torch.ones(SIZE // 2))


def write_onnx(path):
    onnx = pytest.importorskip('onnx')
    weight = onnx.numpy_helper.from_array(TENSORS['a'].numpy(), 'a')
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], 'g', [], [], [weight])), str(path))


def write_figure(path):
    figure = Figure(figsize=(10, 10))
    figure.figimage(NOISE)
    figure.savefig(path, format='png')


def write_folder(path):
    """As coremltools does: beside temporary files, and copied."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'weight.bin').write_bytes(bytes(2 * SIZE))
        shutil.copytree(folder, path)


def write_in_another_process(path):
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        pool.apply(path.write_bytes, [bytes(2 * SIZE)])


WRITERS = {
    'bytes': lambda path: path.write_bytes(bytes(2 * SIZE)),
    'torch, by name': lambda path: torch.save(TENSORS, path),
    'torch, of old': lambda path: torch.save(TENSORS, path, _use_new_zipfile_serialization=False),
    'safetensors': lambda path: save_file(TENSORS, path),
    'Pillow, PNG': lambda path: Image.fromarray(NOISE).save(path, 'PNG'),
    'Pillow, JPEG': lambda path: Image.fromarray(NOISE).save(path, 'JPEG', quality=100),
    'matplotlib': write_figure,
    'ONNX': write_onnx,
    'a folder': write_folder,
    'another process': write_in_another_process,
}


@pytest.mark.parametrize('writer', WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_said_whatever_writes(small_disk, writer):
    with pytest.raises(UserError) as raised, atomic_write(small_disk / 'a.pth') as beside:
        writer(beside)
    assert str(raised.value) == (
        f'{small_disk / "a.pth"} cannot be written: the disk is full. What was there before stays.'
    )
    assert_as_before(small_disk)


def test_what_fits_is_written(small_disk):
    write_checkpoint(STATE, small_disk / 'a.pth')
    assert torch.equal(read_checkpoint(small_disk / 'a.pth')['state_dict']['a'], torch.ones(3))


@pytest.mark.parametrize('number', [1, 3000])
def test_a_checkpoint_on_a_full_disk(small_disk, number):
    """Of one large tensor, and of many small ones, which torch gathers in a buffer."""
    tensors = {str(index): torch.ones(SIZE // number) for index in range(number)}
    for write in (
        lambda path: write_checkpoint(dict(state_dict=tensors), path),
        lambda path: write_safetensors(tensors, path, {}),
        lambda path: put(bytes(2 * SIZE), str(path), dict(backend='recnext.atomic')),  # as the hook in training does
    ):
        with pytest.raises(UserError, match=r'disk/a\.pth cannot be written: the disk is full'):
            write(small_disk / 'a.pth')
        assert_as_before(small_disk)


@pytest.mark.parametrize('write', [write_dataset, write_objects])
def test_a_sample_dataset_on_a_full_disk(small_disk, write):
    with pytest.raises(UserError, match=r'disk/samples cannot be written: the disk is full'):
        write(small_disk / 'samples', training=150, validation=1)
    assert_as_before(small_disk)


def test_an_overlay_video_on_a_full_disk(small_disk, tmp_path):
    """OpenCV does not tell."""
    clip = tmp_path / 'clip.mp4'
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter_fourcc(*'mp4v'), 5, (320, 240))
    for shift in range(10):
        writer.write(np.roll(NOISE, shift)[:240, :320].copy())
    writer.release()
    predictor = load_deployed(*write_tiny(tmp_path))
    with pytest.raises(UserError, match=r'disk/a\.mp4 cannot be written: the disk is full'):
        with atomic_write(small_disk / 'a.mp4') as beside:
            predict_video(predictor, clip, beside)
    assert_as_before(small_disk)


def test_the_conversion_on_a_full_disk(small_disk, released):
    result = run_tool('convert_checkpoint', released('recnext_m0_distill_300e'), small_disk / 'a.pth')
    assert_user_error(result, f'{small_disk / "a.pth"} cannot be written: the disk is full')
    assert_as_before(small_disk)


@pytest.mark.parametrize('fill', [False, True], ids=['another disk is full', 'so is this one'])
def test_errors_that_are_not_of_this_writing(small_disk, tmp_path, fill):
    """A full disk elsewhere does not make this one full; nor does a full one make every error its own."""
    elsewhere = OSError(errno.ENOSPC, 'No space left on device', str(tmp_path / 'temporary'))
    for error in (elsewhere, KeyError('a'), FileNotFoundError(errno.ENOENT, 'No such file', 'another')):
        with pytest.raises(type(error)) as raised, atomic_write(small_disk / 'a.pth') as beside:
            if fill:
                with pytest.raises(OSError, match='No space left'):
                    beside.write_bytes(bytes(2 * SIZE))
            raise error
        assert raised.value is error
        assert_as_before(small_disk)


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path, monkeypatch):
    # In a container every process may have the number that the killed one had.
    (tmp_path / f'{PARTIAL}{os.getpid()}').mkdir()
    write_checkpoint(STATE, tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth')


def write(path, content):
    with atomic_write(path) as beside:
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
from projects.recnext.recnext.checkpoints.files import read_checkpoint, write_checkpoint
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
