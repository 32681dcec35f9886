"""Every defect of a dataset, planted in a copy of sound data: found, by file, and nothing else is."""

import contextlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers.reference import CLASSIFIER_CONFIGS, config_of
from helpers.tiny import write_tiny_config
from helpers.tools import assert_user_error, run_tool
from PIL import Image

from projects.recnext.recnext.openmmlab import check_dataset as check_api
from projects.recnext.recnext.openmmlab import dataset_pictures
from projects.recnext.recnext.openmmlab.check_dataset import check_dataset
from projects.recnext.recnext.openmmlab.checks import set_data_root
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.openmmlab.sample_rules import KINDS, is_cut_off
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError, printable

TRAINING = 6
EXPECTED = {'absent'}
"""The scenes have 27 of the 150 classes."""


@pytest.fixture(scope='module')
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'scenes'
    write_dataset(root, training=TRAINING, validation=2)
    return root


@pytest.fixture
def scenes(sound, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(sound, tmp_path / 'scenes'))


def check(config: Path, work_dir: Path, pictures: bool = False, **kwargs: object) -> tuple[dict, str]:
    """What the tool reports, and its error; without the pictures, which take most of the time."""
    error = ''
    with contextlib.ExitStack() as stack:
        if not pictures:
            for module, draw in ((dataset_pictures, '_draw_sheet'), (check_api, 'draw_classes')):
                stack.enter_context(mock.patch.object(module, draw, side_effect=lambda *args: Path(args[-1]).touch()))
        try:
            check_dataset(str(config), work_dir=str(work_dir), **kwargs)
        except UserError as raised:
            error = str(raised)
    return json.loads((work_dir / 'check_dataset.json').read_text()), error


def found(report: dict, root: Path) -> list[tuple[str, str, str]]:
    """Kind, split and file of each finding, but for the classes that the scenes do not have."""
    return sorted(
        (finding['kind'], finding['split'], os.path.relpath(finding['path'], root))
        for finding in report['findings']
        if finding['kind'] not in EXPECTED
    )


def image(number: int, folder: str = 'training') -> str:
    return f'images/{folder}/scene_{folder}_{number:05}.jpg'


def labels(number: int, folder: str = 'training') -> str:
    return f'annotations/{folder}/scene_{folder}_{number:05}.png'


def test_sound_data_has_no_findings(sound, tmp_path):
    config = write_tiny_config(tmp_path, sound)
    report, error = check(config, tmp_path / 'work', pictures=True)
    assert not error and found(report, sound) == []
    assert [(part['split'], part['images']) for part in report['datasets']] == [('train', TRAINING), ('val', 2)]
    # The numbers of the plot, counted anew.
    arrays = [np.array(Image.open(path)) for path in (sound / 'annotations' / 'training').glob('*.png')]
    for index, row in enumerate(report['datasets'][0]['classes']):
        assert row['pixels'] == sum(int((array == index + 1).sum()) for array in arrays), row
        assert row['images'] == sum(bool((array == index + 1).any()) for array in arrays), row
    for name in ('train', 'val', 'classes'):
        with Image.open(tmp_path / 'work' / f'check_dataset_{name}.png') as picture:
            assert min(picture.size) > 100


def save(kind: str, **options: object) -> Callable[[Path], None]:
    """Write an annotation again, as another kind of image."""

    def plant(path: Path) -> None:
        Image.open(path).convert(kind).save(path, **options)

    return plant


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def add_to(value: int, kind: type) -> Callable[[Path], None]:
    def plant(path: Path) -> None:
        Image.fromarray((np.array(Image.open(path)).astype(int) + value).astype(kind)).save(path)

    return plant


def resize(*size: int) -> Callable[[Path], None]:
    return lambda path: Image.open(path).resize(size, Image.Resampling.NEAREST).save(path)


def turn(path: Path) -> None:
    picture = Image.open(path)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)


def make_palette(path: Path) -> None:
    picture = Image.open(path)
    picture.putpalette([value for value in range(256) for _ in 'RGB'])
    picture.save(path)


DEFECTS = [
    # What is done to which file, and what must be found of which file.
    (labels(1), Path.unlink, 'no annotation', labels(1), 'lacks 1 of 6 annotations'),
    (image(1), Path.unlink, 'no image', labels(1), 'has no image'),
    (image(2), lambda path: path.write_bytes(b''), 'unreadable', image(2), 'an empty file'),
    (image(2), cut, 'unreadable', image(2), 'truncated'),
    (image(2), lambda path: path.write_text('no picture'), 'unreadable', image(2), 'cannot be read'),
    (labels(2), cut, 'unreadable', labels(2), 'truncated'),
    (labels(2), lambda path: path.write_bytes(b''), 'unreadable', labels(2), 'an empty file'),
    (labels(2), lambda path: path.write_text('none'), 'unreadable', labels(2), 'not an image of a known format'),
    (labels(3), save('RGB'), 'channels', labels(3), 'has 3 channels'),
    (labels(3), save('RGBA'), 'channels', labels(3), 'has 4 channels'),
    (labels(3), save('LA'), 'channels', labels(3), 'has 2 channels'),
    (labels(3), make_palette, 'palette', labels(3), 'palette'),
    (labels(3), save('I;16'), 'wide labels', labels(3), 'more than 8 bits'),
    (labels(3), add_to(256, np.uint16), '16 bits', labels(3), 'keeps 8 bits only'),
    (labels(4), resize(100, 90), 'size', labels(4), '90 × 100'),
    (image(4), resize(100, 90), 'size', labels(4), '90 × 100'),
    (image(4), turn, 'size', labels(4), 'EXIF'),
    (labels(5), lambda path: Image.new('L', (256, 192)).save(path), 'ignored', labels(5), 'no pixel that counts'),
    (image(0), lambda path: path.rename(path.with_suffix('.JPG')), 'not used', image(0)[:-3] + 'JPG', 'not used'),
    (image(0), lambda path: path.with_name('a').symlink_to(path.parent), 'loop', 'images/training/a', 'leads back'),
]  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize(('file', 'plant', 'kind', 'named', 'words'), DEFECTS)
def test_a_defect_is_found_by_file_and_no_other(scenes, tmp_path, file, plant, kind, named, words):
    plant(scenes / file)
    report, error = check(write_tiny_config(tmp_path, scenes), tmp_path / 'work')
    others = {('no image', 'train', labels(0))} if kind == 'not used' else set()
    assert set(found(report, scenes)) - others == {(kind, 'train', named)}
    (finding,) = [finding for finding in report['findings'] if finding['kind'] == kind]
    assert words in finding['message'] and finding['level'] == KINDS[kind].level
    assert bool(error) == (KINDS[kind].level == 'error')


def test_many_defects_at_once(scenes, tmp_path):
    planted = [(labels(1), Path.unlink), (image(2), cut), (labels(3), save('RGB')), (labels(4), resize(100, 90))]
    for file, plant in planted:
        plant(scenes / file)
    shutil.copy(scenes / image(5), scenes / image(0, 'validation'))
    report, error = check(write_tiny_config(tmp_path, scenes), tmp_path / 'work')
    assert found(report, scenes) == [
        ('channels', 'train', labels(3)),
        ('leak', 'val', image(0, 'validation')),
        ('no annotation', 'train', labels(1)),
        ('size', 'train', labels(4)),
        ('unreadable', 'train', image(2)),
    ]
    assert '4 errors' in error and 'check_dataset.json' in error


def test_the_same_name_in_two_folders(scenes, tmp_path):
    for kind, ending in (('images', 'jpg'), ('annotations', 'png')):
        (scenes / kind / 'training' / 'more').mkdir()
        name = f'scene_training_00001.{ending}'
        shutil.copy(scenes / kind / 'training' / name, scenes / kind / 'training' / 'more' / name)
    report, error = check(write_tiny_config(tmp_path, scenes), tmp_path / 'work')
    assert not error and [kind for kind, *_ in found(report, scenes)] == ['same name']


@pytest.mark.every(3)
@pytest.mark.parametrize(
    'name',
    [
        pytest.param('a photo', marks=pytest.mark.full),
        'Ünïcödé 図',
        'two\nlines',
        'tab\tbell\a',
        os.fsdecode(b'latin-\xe9'),
    ],
)
def test_names_of_every_kind(scenes, tmp_path, name, capsys):
    for folder, ending in (('images', 'jpg'), ('annotations', 'png')):
        path = scenes / folder / 'training' / f'scene_training_00000.{ending}'
        path.rename(path.with_name(f'{name}.{ending}'))
    report, error = check(write_tiny_config(tmp_path, scenes), tmp_path / 'work')
    assert not error and found(report, scenes) == []
    cut(scenes / 'images' / 'training' / f'{name}.jpg')
    report, error = check(write_tiny_config(tmp_path, scenes), tmp_path / 'work')
    assert found(report, scenes) == [('unreadable', 'train', f'images/training/{name}.jpg')]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if 'jpg cannot be read' in line]
    assert f'{printable(name)}.jpg cannot be read' in line


@pytest.mark.parametrize('harm', ['no folder', 'no images', 'a file'])
def test_missing_and_empty_folders(scenes, tmp_path, harm):
    folder = scenes / 'images' / 'training'
    shutil.rmtree(folder)
    if harm == 'no images':
        folder.mkdir()
        shutil.rmtree(scenes / 'annotations' / 'training')
        (scenes / 'annotations' / 'training').mkdir()
    elif harm == 'a file':
        folder.touch()
    report, error = check(write_tiny_config(tmp_path, scenes), tmp_path / 'work')
    assert error and found(report, scenes) == [('layout', 'train', 'images/training')]


# Numbering: four classes in annotations of a few labels.


def write_labelled(root: Path, values: list[int], reduce: bool, classes: int = 4) -> Path:
    """A dataset whose annotations have these labels, and its config."""
    for folder in ('training', 'validation'):
        (root / 'images' / folder).mkdir(parents=True)
        (root / 'annotations' / folder).mkdir(parents=True)
        noise = np.random.default_rng(len(folder)).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / 'images' / folder / 'one.jpg')
        array = np.repeat(np.resize(np.array(values, np.uint8), 64)[None], 64, axis=0)
        Image.fromarray(array).save(root / 'annotations' / folder / 'one.png')
    names = [f'class {index}' for index in range(classes)]
    own = f'dataset = dict(type="BaseSegDataset", reduce_zero_label={reduce}, metainfo=dict(classes={names}), '
    own += 'img_suffix=".jpg", seg_map_suffix=".png")\n'
    own += ''.join(f'{split}_dataloader["dataset"].update(dataset)\n' for split in ('train', 'val', 'test'))
    return write_tiny_config(root, root, own + f'model["decode_head"]["num_classes"] = {classes}\n')


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ('values', 'reduce', 'kind', 'words'),
    [
        ([0, 1, 2, 3], False, None, ''),
        ([0, 1, 2, 3, 4], True, None, ''),
        ([1, 2, 3, 4, 255], True, None, ''),
        ([0, 1, 2, 3, 255], False, None, ''),
        ([1, 2, 3, 4], False, 'numbering', 'label 0 never occurs and label 4 does'),
        ([0, 1, 2, 3, 4], False, 'numbering', 'Or there is a class more: name 5 classes'),
        ([0, 3, 7], False, 'numbering', 'labels up to 7 occur, and there are 4 classes'),
        ([0, 5], True, 'numbering', 'labels up to 4 occur, one less than in the files'),
        ([0, 255], False, 'numbering', 'Write 1 for 255'),
        ([0, 1, 2, 3], True, 'shifted', 'reduce_zero_label=False'),
    ],
)
def test_numbering(tmp_path, values, reduce, kind, words):
    report, error = check(write_labelled(tmp_path / 'own', values, reduce), tmp_path / 'work', splits=['train'])
    told = [finding for finding in report['findings'] if finding['kind'] in ('numbering', 'shifted')]
    assert [finding['kind'] for finding in told] == [kind][: kind is not None]
    assert all(words in finding['message'] for finding in told)
    assert bool(error) == (kind == 'numbering')
    wrong = [finding for finding in report['findings'] if finding['kind'] == 'labels']
    assert bool(wrong) == (kind == 'numbering' and 255 not in values)


def test_a_test_set_without_annotations(scenes, tmp_path):
    shutil.rmtree(scenes / 'annotations' / 'validation')
    bare = "test_dataloader['dataset'].update(data_prefix=dict(_delete_=True, img_path='images/validation'))\n"
    bare += "test_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]\n"
    report, error = check(write_tiny_config(tmp_path, scenes, bare), tmp_path / 'work', splits=['test'], pictures=True)
    assert not error and found(report, scenes) == [] and report['images'] == 2


def test_a_decompression_bomb(scenes, tmp_path):
    small = io.BytesIO()
    Image.new('L', (8, 8)).save(small, 'PNG')
    content = bytearray(small.getvalue())
    content[16:24] = struct.pack('>II', 60000, 60000)
    content[29:33] = struct.pack('>I', zlib.crc32(content[12:29]))
    for file in (labels(1), image(2)):
        (scenes / file).write_bytes(content)
    report, error = check(write_tiny_config(tmp_path, scenes), tmp_path / 'work')
    assert error and found(report, scenes) == [('unreadable', 'train', labels(1)), ('unreadable', 'train', image(2))]


def test_classes_of_dataset_and_head(sound, tmp_path):
    config = write_tiny_config(tmp_path, sound, "model['decode_head']['num_classes'] = 27")
    report, error = check(config, tmp_path / 'work', splits=['val'])
    assert error and ('classes', 'val', 'annotations/validation') in found(report, sound)


# What augmentation makes of strange sizes.


def replace_pair(root: Path, number: int, height: int, width: int) -> None:
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(root / image(number))
    Image.fromarray(np.ones((height, width), np.uint8)).save(root / labels(number))


@pytest.mark.parametrize(('height', 'width', 'kind'), [(1, 50, 'channels'), (1, 1, 'channels'), (2, 20000, 'pipeline')])
def test_strange_sizes(scenes, tmp_path, height, width, kind):
    replace_pair(scenes, 2, height, width)
    small = "train_pipeline.insert(2, dict(type='Resize', scale=(2048, 512), keep_ratio=True))\n"
    report, error = check(write_tiny_config(tmp_path, scenes, small), tmp_path / 'work')
    assert error and found(report, scenes) == [(kind, 'train', image(2) if kind == 'pipeline' else labels(2))]


def test_images_smaller_than_the_crop(scenes, tmp_path):
    replace_pair(scenes, 2, 40, 50)
    report, error = check(write_tiny_config(tmp_path, scenes), tmp_path / 'work')
    assert not error and found(report, scenes) == []  # the preprocessor pads
    unpadded = "model['data_preprocessor'].update(size=(32, 32))"
    report, error = check(write_tiny_config(tmp_path, scenes, unpadded), tmp_path / 'work')
    assert error and [kind for kind, *_ in found(report, scenes)] == ['batch']
    assert f'40 × 50: {scenes / image(2)}' in report['findings'][0]['message']


def test_classifiers(tmp_path):
    config = next(path for path in CLASSIFIER_CONFIGS if 'sample-objects' in path.name)
    for split in ('train', 'val'):
        for index in range(8):
            folder = tmp_path / 'objects' / split / f'kind {index}'
            folder.mkdir(parents=True)
            noise = np.random.default_rng(index + 10 * len(split)).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / 'one.jpg')
    root = tmp_path / 'objects'
    report, error = check(config, tmp_path / 'work', pictures=True, data_root=str(root))
    assert not error and found(report, root) == []
    assert (tmp_path / 'work' / 'check_dataset_train.png').exists()
    cut(root / 'train' / 'kind 3' / 'one.jpg')
    (root / 'val' / 'kind 5' / 'one.jpg').unlink()
    report, error = check(config, tmp_path / 'work', data_root=str(root))
    assert error and found(report, root) == [
        ('layout', 'val', 'val/kind 5'),
        ('unreadable', 'train', 'train/kind 3/one.jpg'),
    ]


def test_a_jpegis_cut_off_or_not(sound):
    content = (sound / image(0)).read_bytes()
    assert not is_cut_off(content) and not is_cut_off(content + b'behind the end')
    assert all(is_cut_off(content[:end]) for end in (3, 20, len(content) // 2, len(content) - 1))
    thumbnail = b'\xff\xe1' + (len(content) + 2).to_bytes(2, 'big') + content
    assert is_cut_off(content[:2] + thumbnail + content[2:-40])


def test_the_cheap_part_goes_by_the_same_rules(scenes, tmp_path):
    cfg = load_config(write_tiny_config(tmp_path, scenes))
    set_data_root(cfg, None, ('train', 'val'), 150)
    resize(100, 90)(scenes / labels(4))
    with pytest.raises(UserError, match=r'00004\.png is 90 × 100.*\n.*tools/check_dataset\.py'):
        set_data_root(cfg, None, ('train', 'val'), 150)


def test_as_a_command(scenes, ade20k_sample, tmp_path):
    cut(scenes / image(2))
    result = run_tool('check_dataset', write_tiny_config(tmp_path, scenes), '--work-dir', tmp_path / 'work')
    assert_user_error(result, '1 error,', 'check_dataset.json')
    assert f'{scenes / image(2)} cannot be read: truncated' in result.stdout
    options = ['--split', 'val', '--data-root', ade20k_sample, '--work-dir', tmp_path / 'real']
    real = run_tool('check_dataset', config_of('m3'), *options)
    assert real.returncode == 0 and '3 images' in real.stdout and 'No errors, 1 warning.' in real.stdout


def test_wrong_use(tmp_path, sound):
    result = run_tool('check_dataset', config_of('m3'), '--split', 'all')
    assert result.returncode == 2 and 'invalid choice' in result.stderr
    with pytest.raises(UserError, match='No such config'):
        check_dataset(str(tmp_path / 'none.py'))
    config = write_tiny_config(tmp_path, sound, 'train_dataloader = None')
    with pytest.raises(UserError, match='has no train_dataloader; it has val, test'):
        check_dataset(str(config), ['train'], str(tmp_path / 'work'))
    assert not (tmp_path / 'work').exists()
