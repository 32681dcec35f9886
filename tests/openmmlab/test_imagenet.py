"""The ImageNet side as a user runs it: the sample of objects, training and testing, the page's snippets."""

import json
import os
import re

import numpy as np
import pytest
import torch
from helpers.reference import CLASSIFIER_CONFIGS, ROOT, config_of, read_layout
from helpers.tools import assert_user_error, run_python, run_tool
from mmengine.config import Config
from mmseg.registry import MODELS

from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.checkpoints.keys import convert_state_dict
from projects.recnext.recnext.openmmlab import pretrained
from projects.recnext.recnext.openmmlab.listing import check_before_run
from projects.recnext.recnext.samples.objects import OBJECTS, cut_objects, write_objects
from projects.recnext.recnext.samples.scenes import make_scene
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.files import sha256_of

CONFIG = next(path for path in CLASSIFIER_CONFIGS if 'sample-objects' in path.name)
PAGE = (ROOT / 'docs' / 'imagenet.md').read_text()


@pytest.fixture(scope='module')
def numbers(full) -> tuple[int, int]:
    """Of pictures of each object: to train on, and to test with."""
    return (24, 6) if full else (6, 2)


@pytest.fixture(scope='module')
def objects(numbers, tmp_path_factory):
    root = tmp_path_factory.mktemp('objects') / 'sample'
    write_objects(root, *numbers)
    return root


@pytest.fixture(scope='module')
def released(tmp_path_factory, formula_weights):
    """A folder with stand-ins for released files."""
    folder = tmp_path_factory.mktemp('released')
    weights = formula_weights(read_layout('recnext_m0_distill_300e')['tensors'])
    torch.save({'model': weights}, folder / 'recnext_m0_distill_300e.pth')
    return folder


def accuracies(work_dir) -> list[float]:
    lines = [json.loads(line) for path in work_dir.rglob('scalars.json') for line in path.read_text().splitlines()]
    return [line['accuracy/top1'] for line in lines if 'accuracy/top1' in line]


def test_sample_is_the_same_again_and_each_picture_is_another(objects, numbers, tmp_path):
    files = sorted(path.relative_to(objects) for path in objects.rglob('*.jpg'))
    assert len(files) == len(OBJECTS) * sum(numbers) and {path.parts[1] for path in files} == set(OBJECTS)
    contents = [(objects / path).read_bytes() for path in files]
    for folder in ('once', 'again'):
        write_objects(tmp_path / folder, training=3, validation=1)
    few = [sorted((tmp_path / folder).rglob('*.jpg')) for folder in ('once', 'again')]
    assert [path.read_bytes() for path in few[0]] == [path.read_bytes() for path in few[1]] and len(few[0]) == 32
    assert len(set(contents)) == len(contents)
    with pytest.raises(UserError, match='is there already'):
        write_objects(objects, 1, 1)


def test_cut_objects_show_what_they_are_called():
    found = set()
    for seed in range(8):
        image, labels = make_scene(seed)
        for name, picture in cut_objects(image, labels, np.random.default_rng(seed)):
            assert picture.shape == (64, 64, 3)
            found.add(name)
    assert len(found) > 4


def test_training_raises_the_accuracy_and_testing_repeats_it(full, objects, numbers, tmp_path):
    epochs = 3 if full else 1
    options = ['--cfg-options', f'train_cfg.max_epochs={epochs}', f'param_scheduler.0.end={epochs}']
    options += ['train_dataloader.num_workers=0']
    options += ['val_dataloader.num_workers=0', 'test_dataloader.num_workers=0', 'train_dataloader.batch_size=16']
    trained = run_tool('train', CONFIG, '--data-root', objects, '--work-dir', tmp_path / 'work', *options)
    assert trained.returncode == 0, trained.stderr
    curve = accuracies(tmp_path / 'work')
    assert len(curve) == epochs
    if full:
        assert max(curve) > 2 * 100 / len(OBJECTS) and curve[-1] > curve[0]
    checkpoint = tmp_path / 'work' / f'epoch_{epochs}.pth'
    arguments = [CONFIG, checkpoint, '--data-root', objects, '--work-dir', tmp_path / 'test', *options]
    tested = run_tool('test', *arguments, '--show-dir', tmp_path / 'pictures')
    assert tested.returncode == 0, tested.stderr
    # The last line of a run holds its metrics.
    (result,) = [json.loads(path.read_text()) for path in (tmp_path / 'test').glob('*/*.json')]
    assert result['accuracy/top1'] == pytest.approx(curve[-1], abs=1e-3)
    assert len(list((tmp_path / 'pictures').glob('*.png'))) == numbers[1] * len(OBJECTS)
    assert_user_error(
        run_tool('test', CONFIG, checkpoint, '--data-root', objects, '--out', tmp_path / 'out'),
        '--out saves label maps',
    )


def test_bad_folders_are_named(objects, tmp_path):
    dataset = Config.fromfile(CONFIG).val_dataloader.dataset
    for root, classes, words in (
        (tmp_path / 'no', 8, r'val set is not at .*no/val.*\n.*--data-root'),
        (objects, 1000, 'has 8 folders, and the network 1000 classes'),
    ):
        with pytest.raises(UserError, match=words):
            check_before_run({**dataset, 'data_root': str(root)}, 'val', classes, segmentation=False)
    for name in OBJECTS:
        (tmp_path / 'val' / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r'8 folders of the val set have no images, such as .*bed'):
        check_before_run({**dataset, 'data_root': str(tmp_path)}, 'val', 8, segmentation=False)


@pytest.mark.parametrize('form', ['legacy', 'timm', 'mmpretrain', 'mmseg1'])
def test_from_imagenet_into_the_segmentor(form, released, tmp_path, monkeypatch):
    weights = convert_state_dict(read_checkpoint(released / 'recnext_m0_distill_300e.pth')['model'], form).state_dict
    file = tmp_path / 'weights.pth'
    torch.save({'state_dict': weights}, file)
    cfg = Config.fromfile(config_of('m3')).model
    cfg.backbone.update(arch='m0', init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    cfg.neck.in_channels = [40, 80, 160, 320]
    segmentor, said = MODELS.build(cfg), []
    monkeypatch.setattr(pretrained, 'print_log', lambda line, **_: said.append(line))
    segmentor.init_weights()
    expected = convert_state_dict(weights).state_dict
    state = segmentor.backbone.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    (line,) = said
    assert sha256_of(file) in line and f'{len(expected)} tensors loaded' in line
    assert ('head.head_dist.linear.weight' in line) == (form != 'mmseg1')


def test_tools_refuse_what_is_not_theirs(released, objects, tmp_path):
    checkpoint = released / 'recnext_m0_distill_300e.pth'
    in1k = CONFIG.with_name('recnext-m1_8xb256_in1k.py')
    refused = run_tool('test', CONFIG, checkpoint, '--data-root', objects, '--work-dir', tmp_path)
    assert_user_error(refused, 'shape of head.head.linear.weight', 'arch m0')
    refused = run_tool('test', in1k, checkpoint, '--data-root', tmp_path, '--work-dir', tmp_path)
    assert_user_error(refused, 'train/ and val/', '--data-root')
    for tool, suffix in (('export_onnx', '.onnx'), ('export_coreml', '.mlpackage')):
        refused = run_tool(tool, in1k, checkpoint, '--out', tmp_path / f'out{suffix}')
        assert_user_error(refused, 'is no config of a segmentor')


@pytest.mark.parametrize('snippet', re.findall(r'```python\n(.*?)```', PAGE, re.S))
def test_snippets(snippet, released, tmp_path):
    (released / 'projects').exists() or (released / 'projects').symlink_to(ROOT / 'projects')
    (tmp_path / 'snippet.py').write_text(snippet)
    result = run_python(tmp_path / 'snippet.py', cwd=released, env=dict(os.environ, HF_HUB_OFFLINE='1'))
    assert result.returncode == 0, result.stderr


def test_conversions_of_the_page(released):
    commands = [line.split()[2:] for line in PAGE.splitlines() if 'convert_checkpoint' in line]
    assert len(commands) == 4
    for command in commands:
        # The page shows M3; the stand-in is M0.
        arguments = [argument.replace('recnext_m3', 'recnext_m0') for argument in command]
        result = run_tool('convert_checkpoint', *arguments, cwd=released)
        assert result.returncode == 0, result.stderr
    assert (released / 'model.safetensors').exists()
