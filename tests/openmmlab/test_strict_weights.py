"""Strict loading, in the segmentor and in the backbone's init_cfg, whoever asks for it."""

import copy
import shutil

import pytest
import torch
from helpers.reference import read_layout, released_model_cfg
from mmengine.model import ExponentialMovingAverage
from mmengine.runner.checkpoint import load_checkpoint, load_state_dict
from mmseg.registry import MODELS

from projects.recnext.recnext.checkpoints.keys import ConversionError, convert_state_dict
from projects.recnext.recnext.openmmlab import pretrained
from projects.recnext.recnext.openmmlab.backbone import RecNeXt
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.paths import CLONE

KEY = 'backbone.stages.0.blocks.0.norm.num_batches_tracked'


@pytest.fixture(scope='module')
def model():
    return MODELS.build(released_model_cfg('m0', 5))


@pytest.fixture
def weights(model):
    return {key: torch.ones_like(tensor) for key, tensor in model.state_dict().items()}


LOADERS = {
    'torch': lambda model, state: model.load_state_dict(state),
    'mmengine': lambda model, state: load_state_dict(model, state, strict=False),
}


@pytest.mark.parametrize('target', ['mmseg1', 'legacy'])
@pytest.mark.parametrize('loader', LOADERS)
def test_both_layouts_load(model, weights, loader, target):
    model.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in weights.items()})
    source = convert_state_dict(weights, target).state_dict
    given = copy.copy(source)
    LOADERS[loader](model, source)
    assert source.keys() == given.keys()
    assert all(tensor.min() == 1 for tensor in model.state_dict().values())


@pytest.mark.parametrize('loader', LOADERS)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(model, weights, loader):
    for change in (
        lambda s: s.pop(KEY),
        lambda s: s.update(extra=torch.ones(1)),
        lambda s: s.update({KEY: torch.ones(2)}),
    ):
        model.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in weights.items()})
        state = dict(weights)
        change(state)
        with pytest.raises(ConversionError, match='1 disagreement'):
            LOADERS[loader](model, state)
        assert all(tensor.max() == 0 for tensor in model.state_dict().values())


def test_inside_another_module(model, weights):
    average = ExponentialMovingAverage(model)
    state = {'steps': torch.tensor(3), **{f'module.{key}': tensor for key, tensor in weights.items()}}
    average.load_state_dict(state)
    assert average.steps == 3 and average.module.state_dict()[KEY] == 1


@pytest.mark.filterwarnings('ignore')
def test_a_classification_file_is_told_apart(model, tmp_path):
    torch.save(
        {'model': convert_state_dict(RecNeXt('m0').state_dict(), 'legacy').state_dict}, tmp_path / 'imagenet.pth'
    )
    with pytest.raises(ConversionError, match=r'weights of a backbone .arch m0.*init_cfg'):
        load_checkpoint(model, str(tmp_path / 'imagenet.pth'))


@pytest.fixture(scope='module')
def imagenet_m0(tmp_path_factory, formula_weights):
    path = tmp_path_factory.mktemp('imagenet') / 'recnext_m0_distill_300e.pth'
    torch.save({'model': formula_weights(read_layout('recnext_m0_distill_300e')['tensors'])}, path)
    return path


def with_pretrained(path, arch='m0') -> dict:
    cfg = released_model_cfg(arch)
    cfg.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
    return cfg


@pytest.mark.filterwarnings('ignore')
def test_init_cfg_takes_the_released_file_as_it_is(imagenet_m0, monkeypatch):
    said = []
    monkeypatch.setattr(pretrained, 'print_log', lambda message, **_: said.append(message))
    model = MODELS.build(with_pretrained(imagenet_m0))
    model.init_weights()
    released = convert_state_dict(torch.load(imagenet_m0, weights_only=True)['model'])
    assert released.arch == 'm0'
    for key, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, released.state_dict[key]), key
    assert len(said) == 1
    for words in (str(imagenet_m0), 'sha256', '368 tensors loaded', '14 left out', 'head.head_dist.linear.bias'):
        assert words in said[0]


def test_init_cfg_takes_a_segmentor_too(model, weights, tmp_path):
    torch.save({'state_dict': weights}, tmp_path / 'segmentor.pth')
    backbone = RecNeXt('m0', init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'segmentor.pth')))
    backbone.init_weights()
    assert all(tensor.min() == 1 for tensor in backbone.state_dict().values())


def test_init_cfg_is_strict(imagenet_m0):
    with pytest.raises(ConversionError, match=r'do not fit the backbone.*is m0'):
        MODELS.build(with_pretrained(imagenet_m0, 'm1')).init_weights()


def test_missing_file_says_which_whence_and_how_to_do_without():
    with pytest.raises(UserError) as error:
        MODELS.build(with_pretrained('checkpoints/recnext_a3_distill_300e.pth', 'a3')).init_weights()
    for words in (
        'checkpoints/recnext_a3_distill_300e.pth',
        'releases/download/v2.0/recnext_a3_distill_300e.pth',
        '--cfg-options model.backbone.init_cfg=None',
    ):
        assert words in str(error.value)


def test_relative_paths_are_found_in_the_project_from_anywhere(imagenet_m0, tmp_path, monkeypatch):
    placed = CLONE / 'checkpoints' / 'test_pretrained_m0.pth'
    shutil.copy(imagenet_m0, placed)
    try:
        monkeypatch.chdir(tmp_path)
        backbone = RecNeXt('m0', init_cfg=dict(type='Pretrained', checkpoint='checkpoints/test_pretrained_m0.pth'))
        backbone.init_weights()
        assert backbone.stem[0].norm.num_batches_tracked == 1000
    finally:
        placed.unlink()
