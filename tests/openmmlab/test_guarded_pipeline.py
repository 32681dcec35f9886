"""Files that go bad while a run is under way: it stops, says which and why, in the run itself and from its workers."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import write_tiny_config
from helpers.tools import assert_user_error, run_tool
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image
from torch._utils import ExceptionWrapper

from projects.recnext.recnext.openmmlab.checks import set_data_root
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.openmmlab.guarded_pipeline import SampleError
from projects.recnext.recnext.openmmlab.listing import LOOKED_AT, spread
from projects.recnext.recnext.openmmlab.runner import GuardedRunner
from projects.recnext.recnext.samples.scenes import write_dataset

TRAINING = 24
UNSEEN = 11
"""A scene that the check before the run does not read, so that only the run meets it."""


@pytest.fixture(scope='module')
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('data') / 'scenes'
    write_dataset(root, training=TRAINING, validation=TRAINING)
    return root


@pytest.fixture
def scenes(sound, tmp_path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(sound, tmp_path / 'scenes'))


def image(root: Path, folder: str = 'training') -> Path:
    return root / 'images' / folder / f'scene_{folder}_{UNSEEN:05}.jpg'


def labels(root: Path, folder: str = 'training') -> Path:
    return root / 'annotations' / folder / f'scene_{folder}_{UNSEEN:05}.png'


def test_the_scene_is_not_seen_before_the_run():
    assert UNSEEN not in spread(TRAINING, LOOKED_AT)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def convert(mode: str) -> Callable[[Path], None]:
    return lambda path: Image.open(path).convert(mode).save(path)


def lift(value: int, kind: type) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        Image.fromarray((np.array(Image.open(path)).astype(int) + value).astype(kind)).save(path)

    return harm


HARMS = {
    'cut image': (image, cut, r'\.jpg cannot be read: truncated'),
    'no image': (image, lambda path: path.write_text('words'), r'\.jpg cannot be read'),
    'empty image': (image, lambda path: path.write_bytes(b''), r'\.jpg cannot be read: an empty file'),
    'cut labels': (labels, cut, r'\.png cannot be read: .*truncated'),
    'colours': (labels, convert('RGB'), r'\.png has 3 channels; expected'),
    'alpha': (labels, convert('RGBA'), r'\.png has 4 channels; expected'),
    'of no class': (labels, lift(150, np.uint8), r'\.png has the labels 15\d, .* after reduce_zero_label; expected'),
    '16 bits': (labels, lift(1000, np.uint16), r'\.png has labels from 10\d\d to .*8 bits'),
    'one pixel': (labels, lambda path: Image.new('L', (1, 1)).save(path), r'\.png is one pixel high or wide'),
    'other size': (labels, lambda path: Image.open(path).resize((90, 80)).save(path), r'\.png is 80 × 90'),
}


def read(cfg: Config, split: str = 'train', workers: int = 0) -> int:
    """Take every batch of an epoch as a run does; how many samples there were."""
    loader = cfg[f'{split}_dataloader']
    loader.update(num_workers=workers, sampler=dict(type='DefaultSampler', shuffle=False))
    return sum(len(batch['inputs']) for batch in GuardedRunner.build_dataloader(loader))


@pytest.mark.every(3)
@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('harm', HARMS)
def test_a_file_that_is_bad_is_named(scenes, tmp_path, harm, split):
    which, spoil, words = HARMS[harm]
    path = which(scenes, 'training' if split == 'train' else 'validation')
    spoil(path)
    cfg = load_config(write_tiny_config(tmp_path, scenes))
    set_data_root(cfg, None, (split,), 150)  # does not see it
    with pytest.raises(SampleError, match=words) as caught:
        read(cfg, split)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    assert 'tools/check_dataset.py' in str(caught.value)


@pytest.mark.parametrize('harm', ['cut image', pytest.param('of no class', marks=pytest.mark.full)])
def test_workers_say_the_same(scenes, tmp_path, harm):
    which, spoil, words = HARMS[harm]
    spoil(which(scenes))
    with pytest.raises(SampleError, match=words) as caught:
        read(load_config(write_tiny_config(tmp_path, scenes)), workers=2)
    assert 'Traceback' not in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.full
@pytest.mark.parametrize('wrap', ['ConcatDataset', 'RepeatDataset'])
def test_inside_wrappers_too(scenes, tmp_path, wrap):
    cfg = load_config(write_tiny_config(tmp_path, scenes))
    dataset = cfg.train_dataloader.dataset
    wrapped = dict(datasets=[dataset, dataset]) if wrap == 'ConcatDataset' else dict(dataset=dataset, times=2)
    cfg.train_dataloader.dataset = dict(type=wrap, **wrapped)
    assert read(cfg) == 2 * TRAINING
    cut(image(scenes))
    with pytest.raises(SampleError, match='truncated'):
        read(cfg)


@pytest.fixture(scope='module')
def opened() -> list[str]:
    """The files that this process has opened from now on."""
    paths = []
    sys.addaudithook(lambda event, arguments: paths.append(str(arguments[0])) if event == 'open' else None)
    return paths


@pytest.mark.parametrize('split', ['train', 'test'])
def test_each_file_is_read_once(scenes, tmp_path, opened, split):
    cfg = load_config(write_tiny_config(tmp_path, scenes))
    opened.clear()
    assert read(cfg, split) == TRAINING
    folder = 'training' if split == 'train' else 'validation'
    files = [str(path) for path in scenes.glob(f'*/{folder}/*')]
    assert len(files) == 2 * TRAINING and [opened.count(path) for path in files] == [1] * len(files)


def test_loaders_inside_other_transforms_are_guarded(scenes, tmp_path):
    """Test-time augmentation holds its loader of annotations in lists of lists."""
    cfg = load_config(write_tiny_config(tmp_path, scenes))
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    assert read(cfg, 'test') == 6 * TRAINING  # three scales, flipped and not
    lift(1000, np.uint16)(labels(scenes, 'validation'))
    with pytest.raises(SampleError, match=r'\.png has labels from 10\d\d to .*8 bits'):
        read(cfg, 'test')


def test_what_is_only_unusual_is_read(scenes, tmp_path):
    convert('I;16')(labels(scenes))
    other = labels(scenes).with_name('scene_training_00013.png')
    picture = Image.open(other)
    picture.putpalette([value for value in range(256) for _ in 'RGB'])
    picture.save(other)
    assert read(load_config(write_tiny_config(tmp_path, scenes))) == TRAINING


def test_what_the_pipeline_alone_refuses_is_named(scenes, tmp_path):
    for path, mode in ((image(scenes), 'RGB'), (labels(scenes), 'L')):
        Image.new(mode, (20000, 2)).save(path)
    step = "train_pipeline.insert(2, dict(type='Resize', scale=(2048, 512), keep_ratio=True))\n"
    with pytest.raises(SampleError, match=r'00011\.jpg cannot be prepared: error: OpenCV'):
        read(load_config(write_tiny_config(tmp_path, scenes, step)))


def test_testing_as_a_command(scenes, tmp_path):
    config = write_tiny_config(tmp_path, scenes)
    torch.save(dict(state_dict=MODELS.build(Config.fromfile(config).model).state_dict()), tmp_path / 'tiny.pth')
    cut(image(scenes, 'validation'))
    result = run_tool('test', config, tmp_path / 'tiny.pth', '--work-dir', tmp_path / 'work')
    assert_user_error(result, str(image(scenes, 'validation')), 'cannot be read: truncated')


@pytest.mark.full
def test_a_disk_that_goes_away(scenes, tmp_path):
    """As a command, with workers: a hook takes the images away after the second iteration."""
    hook = tmp_path / 'unmount.py'
    hook.write_text(f"""
import shutil
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class Unmount(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if batch_idx == 1:
            shutil.rmtree({str(scenes / 'images')!r})
""")
    extra = "custom_imports['imports'].append('unmount')\ncustom_hooks = [dict(type='Unmount')]\n"
    extra += 'train_dataloader.update(num_workers=2)\ntrain_cfg.update(max_iters=100)\n'
    config = write_tiny_config(
        tmp_path, scenes, "custom_imports = dict(imports=['projects.recnext.recnext.openmmlab'])\n" + extra
    )
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    options = ['--work-dir', tmp_path / 'work']
    result = run_tool('train', config, *options, fresh=True, timeout=300, cwd=tmp_path, env=environment)
    assert_user_error(result, str(scenes / 'images' / 'training'), 'cannot be read: No such file or directory')
    assert 'Iter(train) [  2/100]' in result.stdout


def test_the_message_of_a_worker_is_cut_out_of_its_traceback():
    try:
        raise SampleError('a.jpg cannot be read: truncated.\n  More: a command')
    except SampleError:
        wrapper = ExceptionWrapper(sys.exc_info(), 'in DataLoader worker process 0')
    with pytest.raises(SampleError) as caught:
        wrapper.reraise()
    assert str(caught.value) == 'a.jpg cannot be read: truncated.\n  More: a command'
