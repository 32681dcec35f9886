"""docs/own_dataset.md from its first line to its last, and what happens to those who stray from it."""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.reference import ROOT, config_of
from helpers.tiny import write_tiny_config
from helpers.tools import assert_user_error, run_tool, warm_python
from mmengine.config import Config
from mmseg.registry import MODELS
from PIL import Image

from projects.recnext.recnext.checkpoints.convert import convert_file
from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.openmmlab.builder import build_on_meta
from projects.recnext.recnext.openmmlab.checks import check_fit, choose_weights, set_data_root
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.files import sha256_of

GUIDE = ROOT / 'docs' / 'own_dataset.md'
CLASSES = ['ground', 'disc', 'square']
LEFT_OUT = 'decode_head.conv_seg.bias, decode_head.conv_seg.weight'


def blocks(language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```', GUIDE.read_text(), flags=re.DOTALL | re.MULTILINE)


class Guide:
    """The guide, followed in a folder that looks like a clone of the repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ('projects', 'tools'):
            (folder / name).symlink_to(ROOT / name)
        for script in blocks('python'):
            path = folder / re.match(r'# (\S+)\n', script)[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text(script)

    def command(self, word: str) -> str:
        """The one command of the guide that holds this word."""
        (found,) = [command.strip() for command in blocks('bash') if word in command]
        return found

    def run(self, word: str, extra: str = '') -> str:
        """Run it, as it stands and with ``extra`` behind; what it says."""
        environment = {**os.environ, 'PATH': f'{Path(warm_python()).parent}:{os.environ["PATH"]}'}
        result = subprocess.run(
            f'{self.command(word)} {extra}', shell=True, cwd=self.folder, env=environment, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr


@pytest.fixture(scope='module')
def guide(full, real_m3, tmp_path_factory) -> Guide:
    """The guide followed up to the training, with the genuine M3 as the release."""
    guide = Guide(tmp_path_factory.mktemp('guide'))
    mirror = tmp_path_factory.mktemp('mirror')
    (mirror / 'recnext_m3_ade20k.pth').symlink_to(real_m3)
    guide.run('draw.py')
    guide.checked = guide.run('check_dataset')
    guide.run('download_checkpoint', f'--base-url {mirror} --dir checkpoints')
    guide.said = guide.run('tools/train.py', '' if full else '--cfg-options train_cfg.max_iters=2')
    return guide


def test_every_command_of_the_guide_is_run_here():
    commands = [
        'draw.py',
        'check_dataset',
        'download_checkpoint',
        'tools/train.py',
        'dist_train.sh',
        'tools/test.py',
        'infer.py',
    ]
    assert len(blocks('bash')) == len(commands)
    assert all(word in block and block.count('\n') == 1 for word, block in zip(commands, blocks('bash')))


def test_the_pictures_and_labels_are_sound(guide):
    assert 'No errors, 0 warnings.' in guide.checked and 'train: 24 images, 3 of 3 classes occur' in guide.checked
    assert (guide.folder / 'work_dirs' / 'small' / 'check_dataset_train.png').exists()


def test_training_keeps_all_but_the_classifier_and_says_so_in_one_line(guide):
    path = 'checkpoints/recnext_m3_ade20k.pth'
    digest = sha256_of(guide.folder / path)
    (line,) = [line for line in guide.said.splitlines() if 'conv_seg' in line]
    assert line.endswith(f'Segmentor weights: {path}, sha256 {digest}, 575 tensors loaded, 2 left out: {LEFT_OUT}')
    quoted = next(block for block in blocks('text') if 'Segmentor weights' in block)
    assert quoted.strip() == line[line.index('Segmentor weights') :].replace(digest, '...')


@pytest.mark.full
def test_it_learns(guide):
    """Far better than predicting the ground everywhere, whose mIoU is a third of its share."""
    said = guide.run('tools/test.py')
    assert re.findall(r'^\|\s+(\w+)\s+\|', said, flags=re.MULTILINE) == ['Class', *CLASSES]
    labels = [np.array(Image.open(path)) for path in (guide.folder / 'shapes/labels/val').glob('*.png')]
    ground = 100 * np.mean([label == 0 for label in labels]) / len(CLASSES)
    assert 20 < ground < 30 and float(re.search(r'mIoU: ([\d.]+)', said)[1]) > 2 * ground
    pictures = sorted((guide.folder / 'shapes' / 'pictures').glob('*.png'))
    assert len(pictures) == 6 and all(Image.open(picture).width > 1000 for picture in pictures)


@pytest.mark.full
def test_two_processes(guide):
    said = guide.run('dist_train.sh')
    assert '(2 processes x 2)' in said and said.count('Segmentor weights') == 1 and LEFT_OUT in said
    trained = read_checkpoint(guide.folder / 'work_dirs' / 'two' / 'iter_2.pth')
    assert trained['state_dict']['decode_head.conv_seg.weight'].shape[0] == 3
    assert trained['meta']['dataset_meta']['classes'] == tuple(CLASSES)


@pytest.mark.full
def test_prediction(guide):
    guide.run('infer.py')
    for truth in (guide.folder / 'shapes/labels/val').glob('*.png'):
        (predicted,) = (guide.folder / 'shapes/predicted').rglob(f'labels/**/{truth.name}')
        assert np.mean(np.array(Image.open(predicted)) == np.array(Image.open(truth))) > 0.8


def test_the_configs_are_what_the_page_says_they_are(guide):
    ours, small = (Config.fromfile(guide.folder / 'shapes' / name) for name in ('config.py', 'small.py'))
    base = Config.fromfile(config_of('m3'))
    assert ours.train_pipeline == base.train_pipeline and ours.optim_wrapper == base.optim_wrapper
    assert ours.model.decode_head.num_classes == small.model.decode_head.num_classes == 3
    assert ours.train_cfg.max_iters == ours.param_scheduler[0].end and small.train_cfg.max_iters == 30


def test_resuming_stays_strict(guide):
    options = ['--resume', guide.folder / 'checkpoints' / 'recnext_m3_ade20k.pth', '--work-dir', guide.folder / 'no']
    result = run_tool('train', 'shapes/small.py', *options, cwd=guide.folder)
    assert_user_error(result, 'shape of decode_head.conv_seg.weight: found (150', 'expected (3')
    assert not (guide.folder / 'no').exists()


def test_testing_stays_strict(guide):
    cfg = load_config(guide.folder / 'shapes' / 'small.py')
    with pytest.raises(UserError, match=r'conv_seg\.weight: found \(150, 128, 1, 1\), expected \(3, 128, 1, 1\)'):
        path = guide.folder / 'checkpoints' / 'recnext_m3_ade20k.pth'
        check_fit(build_on_meta(cfg.model), path, read_checkpoint(path))


# Beside the guide.


def tiny(scenes: Path, folder: Path, num_classes: int) -> Config:
    cfg = load_config(write_tiny_config(folder, scenes))
    cfg.model.decode_head.num_classes = num_classes
    return cfg


@pytest.mark.parametrize('kind', ['RecNeXtEncoderDecoder', 'FastEncoderDecoder'])
@pytest.mark.parametrize(('num_classes', 'left_out'), [(150, 0), (7, 2), (1, 2)])
def test_what_is_kept_is_kept_to_the_last_bit(scenes, tmp_path, kind, num_classes, left_out):
    torch.manual_seed(0)
    source = MODELS.build(tiny(scenes, tmp_path, 150).model).state_dict()
    torch.save({'state_dict': source}, tmp_path / 'source.pth')
    cfg = tiny(scenes, tmp_path, num_classes)
    cfg.model.type, cfg.load_from = kind, str(tmp_path / 'source.pth')
    start = choose_weights(cfg, None, build_on_meta(cfg.model))
    assert not cfg.resume and cfg.load_from == str(start.path) == str(tmp_path / 'source.pth')
    model = MODELS.build(cfg.model)
    model.load_checked({**model.state_dict(), **start.content['state_dict']})
    differing = [key for key, tensor in model.state_dict().items() if not torch.equal(tensor, source[key])]
    assert sorted(differing) == sorted(LEFT_OUT.split(', '))[: left_out and 2]


def test_resume_with_nothing_to_resume_starts_from_load_from(scenes, tmp_path):
    cfg = tiny(scenes, tmp_path, 7)
    source = MODELS.build(tiny(scenes, tmp_path, 150).model).state_dict()
    torch.save({'state_dict': source}, tmp_path / 'source.pth')
    cfg.load_from, cfg.work_dir = str(tmp_path / 'source.pth'), str(tmp_path / 'work')
    start = choose_weights(cfg, 'auto', build_on_meta(cfg.model))
    assert cfg.resume is False and cfg.load_from == str(start.path) == str(tmp_path / 'source.pth')


@pytest.mark.parametrize('harm', ['narrower head', 'missing', 'unexpected', 'missing classifier', 'another variant'])
def test_other_misfits_are_refused(scenes, tmp_path, harm):
    source = MODELS.build(tiny(scenes, tmp_path, 150).model).state_dict()
    if harm == 'narrower head':
        source['decode_head.conv_seg.weight'] = source['decode_head.conv_seg.weight'][:, :8]
    elif harm.startswith('missing'):
        del source['decode_head.conv_seg.weight' if 'classifier' in harm else 'neck.fpn_convs.0.conv.weight']
    elif harm == 'unexpected':
        source['extra'] = torch.ones(1)
    else:
        source['backbone.stem.0.conv.weight'] = source['backbone.stem.0.conv.weight'][:2]
    torch.save({'state_dict': source}, tmp_path / 'source.pth')
    cfg = tiny(scenes, tmp_path, 7)
    cfg.load_from = str(tmp_path / 'source.pth')
    with pytest.raises(UserError, match=r'source\.pth: The weights do not fit this segmentor.*1 disagreement'):
        choose_weights(cfg, None, build_on_meta(cfg.model))


def own(cfg: Config, classes: int, root: Path) -> None:
    """Make a config's training set one of so many classes."""
    cfg.train_dataloader.dataset.update(
        type='BaseSegDataset', data_root=str(root), img_suffix='.jpg', seg_map_suffix='.png',
        metainfo=dict(classes=[f'class {n}' for n in range(classes)]),
    )  # fmt: skip


def relabel(root: Path, labels: np.ndarray) -> None:
    for path in (root / 'annotations' / 'training').glob('*.png'):
        Image.fromarray(labels).save(path)


@pytest.mark.parametrize(
    ('labels', 'classes', 'words'),
    [
        (np.full((192, 256), 3, np.uint8), 3, 'has the labels 3; expected a PNG of one channel with labels 0 to 2'),
        (np.full((192, 256, 3), 1, np.uint8), 3, 'has 3 channels; expected'),
        (np.zeros((192, 256), np.uint8), 5, 'The train set has 5 classes, the network 3'),
        (np.zeros((192, 256), np.uint8), 0, 'The train set has 0 classes, the network 3'),
    ],
)
def test_labels_of_other_classes_are_refused_before_the_first_iteration(tmp_path, labels, classes, words):
    write_dataset(tmp_path / 'scenes', training=2, validation=1)
    cfg = tiny(tmp_path / 'scenes', tmp_path, 3)
    relabel(tmp_path / 'scenes', labels)
    own(cfg, classes, tmp_path / 'scenes')
    with pytest.raises(UserError, match=re.escape(words)):
        set_data_root(cfg, None, ('train',), cfg.model.decode_head.num_classes)


def test_labels_that_cannot_be_read_are_named(tmp_path):
    write_dataset(tmp_path / 'scenes', training=2, validation=1)
    cfg = tiny(tmp_path / 'scenes', tmp_path, 150)
    (tmp_path / 'scenes' / 'annotations' / 'training' / 'scene_training_00001.png').write_bytes(b'no picture')
    with pytest.raises(UserError, match=r'scene_training_00001\.png cannot be read'):
        set_data_root(cfg, None, ('train',), cfg.model.decode_head.num_classes)


def test_palette_pngs_and_ignored_pixels_are_fine(tmp_path):
    write_dataset(tmp_path / 'scenes', training=2, validation=1)
    cfg = tiny(tmp_path / 'scenes', tmp_path, 3)
    own(cfg, 3, tmp_path / 'scenes')
    for path in (tmp_path / 'scenes' / 'annotations' / 'training').glob('*.png'):
        image = Image.fromarray(np.tile(np.array([0, 1, 2, 255], np.uint8), (192, 64)), 'P')
        image.putpalette([value for value in range(256) for _ in 'RGB'])
        image.save(path)
    set_data_root(cfg, None, ('train',), cfg.model.decode_head.num_classes)


def test_a_raw_release_is_taken_as_well(real_m3, tmp_path):
    """The 0.x file and the converted one: the same network."""
    convert_file(real_m3, tmp_path / 'm3.pth')
    cfg = Config.fromfile(config_of('m3'))
    cfg.model.decode_head.num_classes, cfg.model.backbone.init_cfg = 3, None
    models = []
    for path in (real_m3, tmp_path / 'm3.pth'):
        torch.manual_seed(0)
        models.append(MODELS.build({**cfg.model, 'init_cfg': dict(type='Pretrained', checkpoint=str(path))}))
        models[-1].init_weights()
    raw, converted = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, converted[key]) for key, tensor in raw.items())
