"""Prediction of files as a user runs it: every kind of input, bad ones, interrupted runs, several processes."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.predicting import infer
from helpers.reference import ROOT, genuine_maps
from helpers.scenes import HEIGHT, WIDTH, save, scene
from helpers.tools import assert_user_error, descendants, run_tool
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from projects.recnext.recnext.checkpoints.files import write_checkpoint
from projects.recnext.recnext.predict import files as files_module
from projects.recnext.recnext.predict.files import show_summary
from projects.recnext.recnext.predict.inputs import Inputs, find_inputs
from projects.recnext.recnext.predict.model import Model, load_deployed
from projects.recnext.recnext.runtimes.deployment import Deployment
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def model(tiny) -> Model:
    return load_deployed(*tiny)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def parts(folder: Path, part: str) -> list[str]:
    return sorted(name.removeprefix(f'{part}/') for name in files(folder) if name.startswith(f'{part}/'))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


# The label maps


def test_the_label_maps_are_the_genuine_ones(real_m3, ade20k_sample, tmp_path):
    images = ade20k_sample / 'images' / 'validation'
    result = run_tool('infer', 'recnext_m3_ade20k', real_m3, images, '--out-dir', tmp_path)
    assert result.returncode == 0, result.stderr
    maps = genuine_maps()
    assert parts(tmp_path, 'labels') == [f'{name}.png' for name in maps] and len(maps) == 3
    for name, expected in maps.items():
        ours = Image.open(tmp_path / 'labels' / f'{name}.png')
        assert ours.mode == 'P' and ours.getpalette()[:6] == [120, 120, 120, 180, 120, 120]
        assert (np.array(ours) != expected).sum() == 0


def test_small_scenes_are_labelled_as_by_the_test_tool_whatever_the_options(tiny, tmp_path):
    data = tmp_path / 'data'
    write_dataset(data, training=1, validation=5)
    options = ['--data-root', data, '--out', tmp_path / 'test', '--work-dir', tmp_path / 'work']
    tested = run_tool('test', *tiny, *options)
    assert tested.returncode == 0, tested.stderr
    theirs = {path.name: np.array(Image.open(path)).astype(int) - 1 for path in (tmp_path / 'test').glob('*.png')}
    assert len(theirs) == 5 and len(np.unique(np.stack(list(theirs.values())))) > 3
    plain = Deployment(fuse='none', channels_last=False)
    for number, options in enumerate((dict(batch_size=3), dict(deployment=plain))):
        out = tmp_path / f'infer{number}'
        infer(*tiny, [data / 'images' / 'validation'], out, overlay=False, **options)
        assert not (out / 'overlays').exists() and parts(out, 'labels') == sorted(theirs)
        for name, expected in theirs.items():
            assert np.array_equal(np.array(Image.open(out / 'labels' / name)), expected)


# Every kind of input


def keys(inputs: Inputs) -> dict[str, str]:
    return {item.name: item.key for item in inputs}


def test_folders_are_searched(tmp_path):
    root = tmp_path / 'pho tos'
    for name in (
        'a.jpg',
        'b/c.PNG',
        'b/d/e.tiff',
        'notes.txt',
        'clip.mp4',
        '.hidden.png',
        '.git/x.png',
        'out/labels/a.png',
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / 'b' / 'circle').symlink_to(root)
    (tmp_path / 'elsewhere').mkdir()
    (tmp_path / 'elsewhere' / 'f.webp').touch()
    (root / 'linked').symlink_to(tmp_path / 'elsewhere')
    found = find_inputs([root], root / 'out')
    assert keys(found) == {'a.jpg': 'a', 'b/c.PNG': 'b/c', 'b/d/e.tiff': 'b/d/e', 'linked/f.webp': 'linked/f'}
    assert len(found) == 4 and all(item.path.exists() for item in found)
    (root / 'b' / 'circle').unlink()
    # Named twice is predicted once; names are relative to what all inputs are in.
    twice = find_inputs([root / 'b', root / 'b' / 'c.PNG', root / 'clip.mp4'], tmp_path / 'out')
    assert keys(twice) == {'b/c.PNG': 'b/c', 'b/d/e.tiff': 'b/d/e', 'clip.mp4': 'clip'}
    assert [item.name for item in twice if item.is_video] == ['clip.mp4']


def test_patterns(tmp_path, monkeypatch):
    for name in ('p/1.jpg', 'p/2.jpg', 'p/q/3.jpg', 'p/q/4.png', 'p/[x].jpg'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert keys(find_inputs(['p/*.jpg'], 'out')) == {'1.jpg': '1', '2.jpg': '2', '[x].jpg': '[x]'}
    assert sorted(keys(find_inputs(['p/**/*.jpg'], 'out'))) == ['1.jpg', '2.jpg', '[x].jpg', 'q/3.jpg']
    assert sorted(keys(find_inputs(['p/q*'], 'out'))) == ['q/3.jpg', 'q/4.png']
    assert keys(find_inputs(['p/[x].jpg'], 'out')) == {'[x].jpg': '[x]'}
    assert keys(find_inputs(['nothing.jpg'], 'out')) == {'nothing.jpg': 'nothing'}


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [(['empty'], 'empty holds no images'), (['*.xyz'], 'Nothing fits'), (['full'], 'folder of the outputs')],
)
def test_inputs_that_cannot_be_meant(tmp_path, monkeypatch, arguments, words):
    (tmp_path / 'empty').mkdir()
    save(tmp_path / 'full' / 'a.png', scene())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        find_inputs(arguments, 'full')


STEMS = st.text('ab.', min_size=1, max_size=4).filter(lambda stem: stem.strip('.'))
NAMES = st.sets(st.builds('{}{}'.format, STEMS, st.sampled_from(['.jpg', '.png', ''])))


@given(folders=st.dictionaries(st.sampled_from(['.', 'x', 'x/y']), NAMES))
def test_no_two_inputs_have_outputs_of_one_name(folders):
    found = list(Inputs(Path('/root'), folders))
    assert len({item.key for item in found}) == len(found) == sum(map(len, folders.values()))
    assert found == list(Inputs(Path('/root'), dict(reversed(folders.items()))))


def test_same_names_do_not_overwrite_each_other(tiny, tmp_path):
    for seed, name in enumerate(('a/x.jpg', 'b/x.jpg', 'b/x.png', 'b/x.jpg.png', 'x/x.jpg')):
        save(tmp_path / name, scene(seed))
    inputs = [tmp_path / 'a' / 'x.jpg', tmp_path / 'b', tmp_path / 'x']
    summary = infer(*tiny, inputs, tmp_path / 'out')
    assert summary['inputs'] == summary['finished'] == 5
    assert parts(tmp_path / 'out', 'labels') == ['a/x.png', 'b/x.jpg.png', 'b/x.jpg.png.png', 'b/x.png.png', 'x/x.png']
    maps = [np.array(Image.open(path)) for path in (tmp_path / 'out' / 'labels').rglob('*.png')]
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(maps, 2))


def write_video(path: Path, frames: list[np.ndarray]) -> Path:
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), 5, (width, height))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def test_a_video(tiny, tmp_path, model):
    path = write_video(tmp_path / 'clip.mp4', [scene(k) for k in range(4)])
    summary = infer(*tiny, [path], tmp_path / 'out')
    report = read_json(tmp_path / 'out' / 'areas' / 'clip.json')
    assert (report['frames'], report['fps'], report['width'], report['height']) == (4, 5, WIDTH, HEIGHT)
    assert [sum(frame.values()) for frame in report['frame_areas']] == [HEIGHT * WIDTH] * 4
    assert summary['pixels'] == sum(area['pixels'] for area in report['areas']) == 4 * HEIGHT * WIDTH
    source, overlay = cv2.VideoCapture(str(path)), cv2.VideoCapture(str(tmp_path / 'out' / 'overlays' / 'clip.mp4'))
    for counts in report['frame_areas']:
        prediction = model(cv2.cvtColor(source.read()[1], cv2.COLOR_BGR2RGB))
        assert {str(area.label): area.pixels for area in prediction.areas} == counts
        there, picture = overlay.read()
        expected = np.array(prediction.overlay(3))[..., ::-1].astype(int)
        assert there and picture.shape[1] == 320 and np.abs(picture[: expected.shape[0]] - expected).mean() < 10
    assert not overlay.read()[0]


# Bad inputs among good ones


def test_bad_inputs_are_reported_and_the_rest_goes_on(tiny, tmp_path):
    photos = tmp_path / 'photos'
    for seed in range(4):
        save(photos / f'{seed}.png', scene(seed))
    (photos / 'bad.png').write_bytes(b'not an image')
    (photos / 'cut.mp4').write_bytes(b'not a video')
    inputs = [photos, photos / 'cut.mp4', photos / 'missing.jpg']
    result = run_tool('infer', *tiny, *inputs, '--out-dir', tmp_path / 'out')
    assert_user_error(
        result, '3 of 7 inputs could not be predicted', 'bad.png is not an image', 'cut.mp4', 'missing.jpg'
    )
    assert 'OpenCV' not in result.stderr and 'ffmpeg' not in result.stderr.lower()
    assert parts(tmp_path / 'out', 'labels') == [f'{seed}.png' for seed in range(4)]
    assert parts(tmp_path / 'out', 'failed') == ['bad.json', 'cut.json', 'missing.json']
    summary = read_json(tmp_path / 'out' / 'summary.json')
    assert summary['finished'] == 4 and sorted(summary['failed']) == ['bad.png', 'cut.mp4', 'missing.jpg']
    # Put right, they are predicted, and nothing else is.
    save(photos / 'bad.png', scene(8))
    save(photos / 'missing.jpg', scene(9))
    write_video(photos / 'cut.mp4', [scene(7)])
    before = files(tmp_path / 'out')
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out' / 'labels').iterdir()}
    infer(*tiny, inputs, tmp_path / 'out')
    assert all(path.stat().st_mtime_ns == before for path, before in times.items())
    after = files(tmp_path / 'out')
    assert not parts(tmp_path / 'out', 'failed') and len(after) == len(before) - 3 + 3 + 2 + 3
    assert read_json(tmp_path / 'out' / 'summary.json')['finished'] == 7


def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    save(tmp_path / 'a.png', scene())
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot be made a folder'):
        infer(*tiny, [tmp_path / 'a.png'], tmp_path / 'file')


def test_a_full_disk_ends_the_run(tiny, tmp_path, monkeypatch):
    photos = tmp_path / 'photos'
    for k in range(5):
        save(photos / f'{k}.png', scene(k))
    real, calls = os.fsync, itertools.count()

    def full(descriptor):
        if next(calls) > 5:
            raise OSError(28, 'No space left on device')
        real(descriptor)

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='cannot be written: the disk is full'):
        infer(*tiny, [photos], tmp_path / 'out')
    monkeypatch.undo()
    assert not list((tmp_path / 'out').rglob('.partial-*'))
    assert infer(*tiny, [photos], tmp_path / 'out')['finished'] == 5


def test_other_settings_are_refused(tiny, tmp_path):
    photos, out = tmp_path / 'photos', tmp_path / 'out'
    save(photos / 'a' / 'a.png', scene())
    infer(*tiny, [photos], out, overlay=False)
    before = files(out)
    other = tmp_path / 'other.pth'
    weights = torch.load(tiny[1], weights_only=True)['state_dict']
    write_checkpoint(dict(state_dict={key: value + 1 for key, value in weights.items()}), other)
    for change, word in (
        (dict(overlay=True), 'overlay: False, now True'),
        (dict(deployment=Deployment(precision='bf16')), 'precision: fp32, now bf16'),
        (dict(checkpoint=other), 'sha256'),
        (dict(cfg_options={'test_dataloader.dataset.pipeline.1.size_divisor': 64}), 'network_and_pipeline'),
        (dict(inputs=[photos / 'a']), 'root'),
    ):
        settings = dict(config=tiny[0], checkpoint=tiny[1], inputs=[photos], out_dir=out, overlay=False) | change
        with pytest.raises(UserError, match=word):
            infer(**settings)
    assert files(out) == before


def test_large_images_are_predicted_one_at_a_time(tiny, tmp_path, monkeypatch):
    for k in range(3):
        save(tmp_path / 'photos' / f'{k}.png', scene(k))
    expected = infer(*tiny, [tmp_path / 'photos'], tmp_path / 'ahead')
    monkeypatch.setattr(files_module, 'MAX_PREFETCH_PIXELS', 100)
    monkeypatch.setattr(Model, 'prepare', _on_the_main_thread(Model.prepare))
    assert infer(*tiny, [tmp_path / 'photos'], tmp_path / 'alone') == expected
    assert files(tmp_path / 'alone') == files(tmp_path / 'ahead')


def _on_the_main_thread(method):
    def checked(*args):
        assert threading.current_thread() is threading.main_thread()
        return method(*args)

    return checked


# Several processes


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """A few images in two folders."""
    root = tmp_path_factory.mktemp('photos')
    for k in range(24):
        save(root / 'ab'[k % 2] / f'{k}.png', scene(k))
    return root


def torchrun(*arguments: object) -> list[str]:
    """Two processes, as the docs say it."""
    launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    return [*launch, '-m', 'projects.recnext.recnext', 'predict', *map(str, arguments)]


def test_every_job_of_an_array_does_its_share(tiny, photos, tmp_path):
    """Processes that no launcher holds together: the last one to finish sums up, whichever it is."""
    options = ['--out-dir', tmp_path / 'three', '--share']
    for place, share in enumerate(('1/3', '3/3', '2/3')):
        result = run_tool('infer', *tiny, photos, *options, share)
        assert result.returncode == 0, result.stderr
        left = 16 - 8 * place
        assert (f'{left} of 24 inputs are left to other processes' in result.stdout) == (left > 0)
        assert (tmp_path / 'three' / 'summary.json').exists() == (left == 0)
    infer(*tiny, [photos], tmp_path / 'alone')
    assert files(tmp_path / 'three') == files(tmp_path / 'alone')


def test_torchrun_goes_on_to_the_end_when_an_input_is_bad(tiny, photos, tmp_path):
    """torchrun ends all processes when one fails: the one that reports has to be the last."""
    shutil.copytree(photos, tmp_path / 'photos')
    (tmp_path / 'photos' / 'a' / 'bad.png').write_bytes(b'')
    (tmp_path / 'photos' / 'b' / 'bad.png').write_bytes(b'')
    command = torchrun(*tiny, tmp_path / 'photos', '--out-dir', tmp_path / 'two')
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.returncode == 1 and 'error: 2 of 26 inputs could not be predicted' in result.stderr
    with pytest.raises(UserError, match='2 of 26 inputs'):
        infer(*tiny, [tmp_path / 'photos'], tmp_path / 'one')
    assert files(tmp_path / 'two') == files(tmp_path / 'one')


def test_what_a_killed_process_left_is_removed(tiny, photos, tmp_path):
    staging = tmp_path / 'out' / '.partial.0' / '.partial-0123'
    staging.mkdir(parents=True)
    (staging / 'half').touch()
    infer(*tiny, [photos], tmp_path / 'out')
    assert not staging.parent.exists()


def test_failures_of_before_are_tried_again_and_nobody_removes_what_another_writes(tiny, tmp_path):
    photos, out = tmp_path / 'photos', tmp_path / 'out'
    photos.mkdir()
    for name in 'ab':
        (photos / f'{name}.png').write_bytes(b'')
    with pytest.raises(UserError, match='2 of 2 inputs'):
        infer(*tiny, [photos], out)
    save(photos / 'a.png', scene())
    save(photos / 'b.png', scene())
    (out / '.partial.1').mkdir()
    with pytest.raises(UserError, match=r'1 of 2 inputs .*\n.*b\.png'):
        infer(*tiny, [photos], out, share=(0, 2))
    assert (out / '.partial.1').is_dir()
    assert infer(*tiny, [photos], out, share=(1, 2))['failed'] == {}
    assert not list(out.rglob('.partial*')) and not parts(out, 'failed')


def test_a_damaged_record_of_the_run_is_an_error_for_a_person(tiny, photos, tmp_path):
    (tmp_path / 'run.json').write_text('{')
    with pytest.raises(UserError, match=r'run\.json is damaged'):
        infer(*tiny, [photos], tmp_path)


def test_names_of_classes_are_printed_as_they_are(capsys):
    rows = [dict(name=name, share=0.5, inputs=1) for name in ('road [/]', 'sign [front]', 'a\x1b[2J')]
    show_summary(dict(inputs=1, finished=1, failed={}, classes=rows), 'out', overlay=False)
    said = capsys.readouterr().out
    assert 'road [/]' in said and 'sign [front]' in said and '\x1b[2J' not in said


@pytest.mark.full
def test_killed_at_random_and_started_again(full, tiny, tmp_path):
    """SIGKILL, again and again; in the end every output is there once, and equal to those of a run without."""
    number, kills = (2000, 20) if full else (60, 1)
    rng, root, out = random.Random(0), tmp_path / 'photos', tmp_path / 'out'
    for k in range(number):
        save(root / f'{k % 7}' / f'{k // 7}.png', scene(k % 50, 32, 32) ^ np.uint8(k // 50))
    command = torchrun(*tiny, root, '--out-dir', out)

    def finished() -> int:
        return sum(1 for _ in (out / 'areas').rglob('*.json'))

    reached, everybody = [], set()
    for kill in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        while len(workers := descendants(process.pid)) < 2:
            assert process.poll() is None
        everybody.update(workers)
        goal = finished() + rng.uniform(0.05, 0.9) * (number - finished()) / (kills - kill + 1)
        while finished() < goal:
            assert process.poll() is None
        # In turn: all; torchrun, whose processes then go on beside the next ones; one, and torchrun ends the other.
        for victim in ([process.pid, *workers], [process.pid], [rng.choice(workers)])[kill % 3]:
            os.kill(victim, signal.SIGKILL)
        assert process.wait(timeout=60) != 0
        reached.append(finished())
    for worker in everybody:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    assert reached == sorted(reached) and 0 < reached[0] < number, reached
    print(f'killed at {reached} of {number}')
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert result.returncode == 0, result.stderr
    infer(*tiny, [root], tmp_path / 'undisturbed')
    disturbed, undisturbed = files(out), files(tmp_path / 'undisturbed')
    assert disturbed.keys() == undisturbed.keys() and len(disturbed) == 3 * number + 2
    assert [name for name in disturbed if disturbed[name] != undisturbed[name]] == []
    assert read_json(out / 'summary.json')['pixels'] == number * 32 * 32
