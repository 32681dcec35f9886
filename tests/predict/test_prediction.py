"""Prediction as a user runs it: every kind of image and input, bad ones, interrupted runs, several processes."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from filelock import FileLock
from helpers.reference import ROOT, genuine_maps
from helpers.scripts import python_of_scripts
from helpers.tiny import write_tiny_config
from helpers.tools import assert_user_error, descendants, run_python, run_tool
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from projects.recnext.recnext.checkpoints.files import write_checkpoint
from projects.recnext.recnext.drawing.overlay import draw_overlay
from projects.recnext.recnext.openmmlab.distributed import ProcessInfo, get_process_info
from projects.recnext.recnext.predict import batch_prediction
from projects.recnext.recnext.predict.batch_inputs import Inputs, find_inputs
from projects.recnext.recnext.predict.batch_prediction import infer
from projects.recnext.recnext.predict.predictor import Prediction, Predictor
from projects.recnext.recnext.runtimes.deployment import Deployment
from projects.recnext.recnext.samples.scenes import make_scene, write_dataset
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.images import ImageError, read_image

pytestmark = pytest.mark.usefixtures('one_thread')

HEIGHT, WIDTH = 48, 64


def scene(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """RGB, uint8."""
    return cv2.resize(make_scene(seed)[0], (width, height))


def save(path: Path, image: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


@pytest.fixture(scope='module')
def predictor(tiny) -> Predictor:
    return Predictor(*tiny)


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


# Every kind of image


def grey(image: np.ndarray) -> np.ndarray:
    return np.array(Image.fromarray(image).convert('L'))


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """What has to be stored so that a viewer, which obeys EXIF, shows the image."""
    undo = {2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1)}
    undo |= {6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}
    return np.ascontiguousarray(undo[orientation](image))


@pytest.mark.parametrize('suffix', ['.png', '.tif', '.webp', '.jpg'])
@pytest.mark.parametrize('orientation', range(2, 9))
def test_rotated_images_are_upright(tmp_path, suffix, orientation):
    image = cv2.GaussianBlur(scene(), (0, 0), 3)  # so that JPEG's blocks do not matter
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(lossless=True) if suffix == '.webp' else dict(quality=100) if suffix == '.jpg' else {}
    path = save(tmp_path / f'a{suffix}', turned(image, orientation), exif=exif, **options)
    read = read_image(path)[..., ::-1].astype(int)
    assert read.shape == image.shape and np.abs(read - image).max() <= (12 if suffix == '.jpg' else 0)


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.bmp', '.webp'])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_ordinary_images_are_those_of_mmsegs_pipeline(tmp_path, suffix, mode):
    path = save(tmp_path / f'a{suffix}', Image.fromarray(scene()).convert(mode))
    assert np.array_equal(read_image(path), cv2.imread(str(path), cv2.IMREAD_COLOR))


def stored(kind: str, folder: Path) -> tuple[Path, np.ndarray, int]:
    """A file, what it should look like (RGB), and by how much that may be missed."""
    image, suffix, tolerance, options = scene(), '.png', 0, {}
    expected = image
    hole = np.full((HEIGHT, WIDTH), 255, np.uint8)
    hole[:20, :30] = 0
    white = np.where(hole[..., None] == 0, 255, image)
    if kind == 'alpha':
        image, expected = np.dstack([image, hole]), white
    elif kind == 'half transparent':
        image, expected, tolerance = np.dstack([image, hole // 2]), np.where(hole[..., None], 255 - (255 - image.astype(int)) * 127 / 255, 255), 1  # fmt: skip # noqa: E501
    elif kind == 'grey with alpha':
        image = np.dstack([grey(image), hole])
        expected = np.where(hole[..., None] == 0, 255, image[..., :1]).repeat(3, 2)
    elif kind == 'palette':
        image = Image.fromarray(image).quantize(64)
        expected = np.array(image.convert('RGB'))
    elif kind == 'palette with transparency':
        image = Image.fromarray(image).quantize(64)
        options = dict(transparency=5)
        expected = np.where((np.array(image) == 5)[..., None], 255, np.array(image.convert('RGB')))
    elif kind == 'gif':
        image, suffix = Image.fromarray(image).quantize(64), '.gif'
        expected = np.array(image.convert('RGB'))
    elif kind == 'bilevel':
        image = Image.fromarray(image).convert('1')
        expected = np.array(image.convert('RGB'))
    elif kind in ('16 bits, grey, png', '16 bits, grey, tif'):
        image, suffix = grey(image).astype(np.uint16) * 257, f'.{kind[-3:]}'
        expected = (image // 257)[..., None].repeat(3, 2)
    elif kind in ('16 bits, colour, png', '16 bits, colour, tif'):
        path = folder / f'a.{kind[-3:]}'
        assert cv2.imwrite(str(path), image[..., ::-1].astype(np.uint16) * 257)
        return path, image, 0
    elif kind in ('cmyk, jpg', 'cmyk, tif'):
        image, suffix = Image.fromarray(image).convert('CMYK'), f'.{kind[-3:]}'
        tolerance, options = (8, dict(quality=100, subsampling=0)) if suffix == '.jpg' else (0, {})
    elif kind == 'several pages':
        options, suffix = dict(save_all=True, append_images=[Image.fromarray(scene(1))]), '.tif'
    return save(folder / f'a{suffix}', image, **options), expected, tolerance


KINDS = [
    'alpha', 'half transparent', 'grey with alpha', 'palette', 'palette with transparency', 'gif', 'bilevel',
    '16 bits, grey, png', '16 bits, grey, tif', '16 bits, colour, png', '16 bits, colour, tif', 'cmyk, jpg',
    'cmyk, tif', 'several pages',
]  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_image_looks_as_in_a_viewer(tmp_path, predictor, kind):
    path, expected, tolerance = stored(kind, tmp_path)
    read = read_image(path)
    assert read.shape == (HEIGHT, WIDTH, 3) and read.dtype == np.uint8
    assert np.abs(read[..., ::-1].astype(int) - expected).max() <= tolerance
    assert predictor(path).labels.shape == (HEIGHT, WIDTH)


def test_cmyk_by_its_own_profile(tmp_path, monkeypatch):
    asked = []

    def convert(image, source, target, outputMode):
        asked.append(source.read())
        return image.convert(outputMode)

    monkeypatch.setattr(ImageCms, 'profileToProfile', convert)
    read_image(save(tmp_path / 'a.jpg', Image.fromarray(scene()).convert('CMYK'), icc_profile=b'the profile'))
    assert asked == [b'the profile']


def test_cmyk_whose_profile_is_broken(tmp_path):
    image = Image.fromarray(scene()).convert('CMYK')
    broken = read_image(save(tmp_path / 'a.tif', image, icc_profile=b'no profile'))
    assert np.array_equal(broken[..., ::-1], scene())


def png_of_size(width: int, height: int) -> bytes:
    """A file that says it has so many pixels, and has hardly any bytes."""
    chunks = [
        (b'IHDR', width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + bytes([8, 2, 0, 0, 0])),
        (b'IDAT', b''),
        (b'IEND', b''),
    ]
    body = b''.join(len(d).to_bytes(4, 'big') + n + d + zlib.crc32(n + d).to_bytes(4, 'big') for n, d in chunks)
    return b'\x89PNG\r\n\x1a\n' + body


def bad_file(kind: str, folder: Path) -> Path:
    path = folder / 'bad.png'
    if kind == 'missing':
        return path
    if kind == 'a folder':
        path.mkdir()
        return path
    if kind == 'floating point':
        return save(path.with_suffix('.tif'), grey(scene()).astype(np.float32))
    if kind == '32 bits':
        return save(path.with_suffix('.tif'), grey(scene()).astype(np.int32) * 1000)
    if kind.startswith('truncated'):
        path = save(path.with_suffix(kind.split()[1]), scene())
    contents = {
        'empty': b'',
        'text': b'not an image',
        'bomb': png_of_size(20000, 20000),
        'no pixels': png_of_size(9, 9),
    }
    path.write_bytes(contents[kind] if kind in contents else path.read_bytes()[: path.stat().st_size // 2])
    return path


BAD = {
    'missing': 'No such file', 'a folder': 'directory', 'empty': 'not an image', 'text': 'not an image',
    'bomb': '179 million pixels', 'no pixels': 'damaged', 'floating point': 'floating-point', '32 bits': '32 bits',
    'truncated .jpg': 'damaged', 'truncated .png': 'damaged', 'truncated .gif': 'truncated',
    'truncated .tif': 'cannot be read', 'truncated .webp': 'cannot be read',
}  # fmt: skip


@pytest.mark.parametrize('kind', BAD)
def test_bad_files_are_named_with_the_reason(tmp_path, kind):
    with pytest.raises(ImageError, match=rf'bad\..*{BAD[kind]}'):
        read_image(bad_file(kind, tmp_path))


def test_extreme_sizes(tmp_path, predictor):
    for height, width in ((1, 1), (3, 500), (500, 2)):
        prediction = predictor(scene(0, height, width))
        assert prediction.labels.shape == (height, width)
        assert prediction.overlay().width >= 320
    with pytest.raises(ImageError, match=r'reaches the network as 8192 × 4096 pixels; expected at most 17 million'):
        predictor(np.zeros((4096, 8192, 3), np.uint8))


def test_an_image_that_the_pipeline_cannot_take(tiny, tmp_path):
    resize = dict(type='Resize', scale=(64, 16), keep_ratio=True)
    pipeline = [dict(type='LoadImageFromFile'), resize, dict(type='PackSegInputs')]
    config = write_tiny_config(tmp_path, tmp_path, f"test_dataloader['dataset']['pipeline'] = {pipeline}")
    with pytest.raises(ImageError, match=r'thin\.png does not go through the test pipeline'):
        Predictor(config, tiny[1])(save(tmp_path / 'thin.png', scene(0, 1, 5000)))


# The call from Python


def test_the_lines_in_the_readme(real_m3, ade20k_sample, tmp_path):
    snippet = re.search(r'```python\n(from projects.recnext.recnext.predict.predictor.*?)```', (ROOT / 'README.md').read_text(), re.S)[1]  # fmt: skip # noqa: E501
    (tmp_path / 'checkpoints').mkdir()
    shutil.copy(real_m3, tmp_path / 'checkpoints' / 'recnext_m3_ade20k.pth')
    shutil.copy(ade20k_sample / 'images' / 'validation' / 'ADE_val_00000001.jpg', tmp_path / 'photo.jpg')
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    result = run_python('-c', snippet, fresh=True, timeout=120, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert Image.open(tmp_path / 'overlay.jpg').width == 683
    assert "name='building'" in result.stdout and 'share=0.402112' in result.stdout


def test_a_file_and_its_pixels_predict_the_same(predictor, tmp_path):
    path = save(tmp_path / 'a.png', scene(3))
    by_file, by_pixels = predictor(path), predictor(scene(3)[..., ::-1])
    assert np.array_equal(by_file.labels, by_pixels.labels) and len(by_file.areas) > 1
    assert [area.pixels for area in by_file.areas] == sorted((area.pixels for area in by_file.areas), reverse=True)
    for area in by_file.areas:
        assert area.pixels == (by_file.labels == area.label).sum()
        assert area.share == pytest.approx(area.pixels / (HEIGHT * WIDTH), abs=1e-6)
        assert area.name == predictor.classes[area.label]


def test_classes_of_the_checkpoint_before_those_of_the_config(tiny, tmp_path):
    config, checkpoint = tiny
    weights = torch.load(checkpoint, weights_only=True)['state_dict']
    names, colours = [f'class {i} ' for i in range(150)], [[i, 0, 0] for i in range(150)]
    meta = dict(dataset_meta=dict(classes=names, palette=colours))
    write_checkpoint(dict(state_dict=weights, meta=meta), tmp_path / 'named.pth')
    predictor = Predictor(config, tmp_path / 'named.pth')
    assert predictor.classes[3] == 'class 3' and predictor.palette[3].tolist() == [3, 0, 0]
    assert Predictor(*tiny).classes[:2] == ['wall', 'building']


def test_more_than_256_classes_are_16_bits():
    labels = np.array([[0, 299], [255, 256]], np.uint16)
    prediction = Prediction(np.zeros((2, 2, 3), np.uint8), labels, [str(i) for i in range(300)], np.zeros((300, 3)))
    image = prediction.label_image()
    assert image.mode == 'I;16' and np.array_equal(np.array(image), labels)


def test_no_memory_on_a_gpu_is_said_of_the_image(predictor, monkeypatch):
    def full(data):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(predictor.segmentor, 'test_step', full)
    with pytest.raises(ImageError, match='too little memory for 1 images of 64 × 48 pixels'):
        predictor(scene())


# The picture


def test_the_legend_names_every_class_and_long_names_are_cut():
    image, labels = np.full((200, 600, 3), 100, np.uint8), np.zeros((200, 600), np.uint8)
    palette = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    picture = np.array(draw_overlay(image, labels, palette, [('a' * 200, palette[0], 1.0), ('b', palette[1], 0.0)]))
    assert picture.shape[1] == 600 and picture.shape[0] > 200
    assert (picture[:200] == (178, 50, 50)).all()
    legend = picture[200:].reshape(-1, 3)
    assert all((legend == colour).all(1).any() for colour in palette)
    without = np.array(draw_overlay(image, labels, palette, []))
    assert picture.shape[0] > without.shape[0]


def test_a_large_image_is_drawn_smaller():
    image, labels = np.zeros((100, 9000, 3), np.uint8), np.zeros((100, 9000), np.uint8)
    picture = draw_overlay(image, labels, np.array([[9, 9, 9]], np.uint8), [])
    assert picture.width == 4096


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


def test_a_video(tiny, tmp_path, predictor):
    path = write_video(tmp_path / 'clip.mp4', [scene(k) for k in range(4)])
    summary = infer(*tiny, [path], tmp_path / 'out')
    report = read_json(tmp_path / 'out' / 'areas' / 'clip.json')
    assert (report['frames'], report['fps'], report['width'], report['height']) == (4, 5, WIDTH, HEIGHT)
    assert [sum(frame.values()) for frame in report['frame_areas']] == [HEIGHT * WIDTH] * 4
    assert summary['pixels'] == sum(area['pixels'] for area in report['areas']) == 4 * HEIGHT * WIDTH
    source, overlay = cv2.VideoCapture(str(path)), cv2.VideoCapture(str(tmp_path / 'out' / 'overlays' / 'clip.mp4'))
    for counts in report['frame_areas']:
        prediction = predictor(source.read()[1])
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
    assert not list((tmp_path / 'out').glob('.partial*'))
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
    monkeypatch.setattr(batch_prediction, 'LARGE', 100)
    monkeypatch.setattr(Predictor, 'prepare', _on_the_main_thread(Predictor.prepare))
    assert infer(*tiny, [tmp_path / 'photos'], tmp_path / 'alone') == expected
    assert files(tmp_path / 'alone') == files(tmp_path / 'ahead')


def _on_the_main_thread(method):
    import threading

    def checked(*args):
        assert threading.current_thread() is threading.main_thread()
        return method(*args)

    return checked


# Several processes


def environment(rank: int, world_size: int) -> dict[str, str]:
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'RANK': str(rank), 'WORLD_SIZE': str(world_size), 'LOCAL_RANK': '0'}


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """A few images in two folders."""
    root = tmp_path_factory.mktemp('photos')
    for k in range(24):
        save(root / 'ab'[k % 2] / f'{k}.png', scene(k))
    return root


def test_places(monkeypatch):
    assert get_process_info('none') == ProcessInfo(0, 1, 0)
    for name, value in dict(SLURM_PROCID='3', SLURM_LOCALID='1', SLURM_NTASKS='8').items():
        monkeypatch.setenv(name, value)
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_PORT'):
        monkeypatch.setenv(name, '')
    monkeypatch.setenv('MASTER_ADDR', 'node1')
    assert get_process_info('slurm') == get_process_info('pytorch') == ProcessInfo(3, 8, 1)


def test_every_job_of_an_array_does_its_share(tiny, photos, tmp_path):
    """Processes that no launcher holds together. The first one says what is missing, and sums up once all is there."""
    options = ['--out-dir', tmp_path / 'three', '--launcher', 'pytorch']
    first = run_tool('infer', *tiny, photos, *options, env=environment(0, 3))
    assert_user_error(first, '16 of 24 inputs are not finished')
    assert not (tmp_path / 'three' / 'summary.json').exists()
    for rank in (1, 2, 0):
        result = run_tool('infer', *tiny, photos, *options, env=environment(rank, 3))
        assert result.returncode == 0, result.stderr
    infer(*tiny, [photos], tmp_path / 'alone')
    assert files(tmp_path / 'three') == files(tmp_path / 'alone')


def test_torchrun_goes_on_to_the_end_when_an_input_is_bad(tiny, photos, tmp_path):
    """torchrun ends all processes when one fails: the one that reports has to be the last."""
    shutil.copytree(photos, tmp_path / 'photos')
    (tmp_path / 'photos' / 'a' / 'bad.png').write_bytes(b'')
    (tmp_path / 'photos' / 'b' / 'bad.png').write_bytes(b'')
    command = ['bash', ROOT / 'tools' / 'dist_infer.sh', *tiny, 2, tmp_path / 'photos', '--out-dir', tmp_path / 'two']
    variables = {**os.environ, **python_of_scripts(fresh=False)}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, timeout=300)
    assert result.returncode == 1 and 'error: 2 of 26 inputs could not be predicted' in result.stderr
    with pytest.raises(UserError, match='2 of 26 inputs'):
        infer(*tiny, [tmp_path / 'photos'], tmp_path / 'one')
    assert files(tmp_path / 'two') == files(tmp_path / 'one')


def test_the_script_says_how_it_is_used():
    for script in ('dist_infer.sh', 'slurm_infer.sh'):
        result = subprocess.run(['bash', ROOT / 'tools' / script, 'CONFIG'], capture_output=True, text=True)
        assert result.returncode == 2 and 'usage' in result.stderr


def test_what_a_killed_process_left_is_removed(tiny, photos, tmp_path):
    staging = tmp_path / 'out' / '.partial'
    for name in ('dead', 'alive'):
        (staging / name).mkdir(parents=True)
        (staging / name / 'half').touch()
        (staging / f'{name}.lock').touch()
    with FileLock(staging / 'alive.lock'):
        infer(*tiny, [photos], tmp_path / 'out')
    assert sorted(path.name for path in staging.iterdir()) == ['alive', 'alive.lock']
    assert (staging / 'alive' / 'half').exists()


@pytest.mark.full
def test_killed_at_random_and_started_again(full, tiny, tmp_path):
    """SIGKILL, again and again; in the end every output is there once, and equal to those of a run without."""
    number, kills = (2000, 20) if full else (60, 1)
    rng, root, out = random.Random(0), tmp_path / 'photos', tmp_path / 'out'
    for k in range(number):
        save(root / f'{k % 7}' / f'{k // 7}.png', scene(k % 50, 32, 32) ^ np.uint8(k // 50))
    command = ['bash', ROOT / 'tools' / 'dist_infer.sh', *tiny, 2, root, '--out-dir', out]
    variables = {**os.environ, **python_of_scripts(fresh=True)}

    def finished() -> int:
        return sum(1 for _ in (out / 'areas').rglob('*.json'))

    reached, everybody = [], set()
    for kill in range(kills):
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=variables
        )
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
    variables.update(python_of_scripts(fresh=False))
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=variables, timeout=600)
    assert result.returncode == 0, result.stderr
    infer(*tiny, [root], tmp_path / 'undisturbed')
    disturbed, undisturbed = files(out), files(tmp_path / 'undisturbed')
    assert disturbed.keys() == undisturbed.keys() and len(disturbed) == 3 * number + 2
    assert [name for name in disturbed if disturbed[name] != undisturbed[name]] == []
    assert read_json(out / 'summary.json')['pixels'] == number * 32 * 32
