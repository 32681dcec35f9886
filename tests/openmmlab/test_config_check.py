"""Mistakes in configs are found before the first iteration, with the name of the key; and sound configs have none."""

import re
import sys

import pytest
from helpers.reference import CLASSIFIER_CONFIGS, SEGMENTOR_CONFIGS, config_of
from helpers.tiny import write_tiny_config
from helpers.tools import assert_user_error, run_tool
from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from projects.recnext.recnext.openmmlab.builder import build_on_meta
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.openmmlab.config_check import check_keys, check_parts_fit, named_mistakes
from projects.recnext.recnext.openmmlab.test import TestOptions
from projects.recnext.recnext.openmmlab.test import test as run_test
from projects.recnext.recnext.openmmlab.train import TrainOptions
from projects.recnext.recnext.openmmlab.train import train as run_train
from projects.recnext.recnext.runtimes.deployment import Deployment
from projects.recnext.recnext.utils.errors import UserError


@pytest.mark.parametrize('path', [CLASSIFIER_CONFIGS[0], *SEGMENTOR_CONFIGS[:2]], ids=lambda path: path.stem)
def test_our_own_configs_are_sound(path):
    check_keys(load_config(path))


MISTAKES = [
    ({'model.backbone.drop_paht_rate': 0.1}, 'model.backbone.drop_paht_rate is unknown', 'mean drop_path_rate?'),
    ({'model.backbon.arch': 'm4'}, 'model.backbon is unknown', 'mean backbone?'),
    ({'model.decode_head.type': 'FPNHaed'}, "model.decode_head.type is 'FPNHaed'", 'mean FPNHead?'),
    ({'train_dataloder': {}}, 'has train_dataloder', 'mean train_dataloader?'),
    ({'train_dataloader.batchsize': 2}, 'train_dataloader.batchsize is unknown', 'mean batch_size?'),
    ({'train_dataloader.dataset.data_rot': 'x'}, 'train_dataloader.dataset.data_rot', 'mean data_root?'),
    ({'train_dataloader.dataset.pipeline.2.crop_sise': 3}, 'pipeline.2.crop_sise is unknown', 'mean crop_size?'),
    ({'train_dataloader.sampler.type': 'DefaultSampeler'}, 'train_dataloader.sampler.type', 'mean DefaultSampler?'),
    ({'optim_wrapper.optimizer.lrr': 0.1}, 'optim_wrapper.optimizer.lrr is unknown', 'mean lr?'),
    ({'optim_wrapper.optimizer.lr': -1}, 'optim_wrapper cannot be built', 'Invalid learning rate: -1'),
    ({'param_scheduler.1.pwer': 1}, 'param_scheduler.1.pwer is unknown', 'mean power?'),
    ({'val_evaluator.iou_metric': ['mIoU']}, 'val_evaluator.iou_metric is unknown', 'mean iou_metrics?'),
    ({'train_cfg.max_iter': 3}, 'train_cfg.max_iter is unknown', 'mean max_iters?'),
    ({'default_hooks.logger.intervall': 3}, 'default_hooks.logger.intervall', 'mean interval?'),
]


@pytest.mark.every(2)
@pytest.mark.parametrize(('options', 'words', 'advice'), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_named_before_the_first_iteration(scenes, tmp_path, options, words, advice):
    config = write_tiny_config(tmp_path, scenes)
    with pytest.raises(UserError) as caught:
        run_train(str(config), TrainOptions(str(tmp_path / 'work'), cfg_options=options))
    assert words in str(caught.value) and advice in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob('work/*.pth'))


def test_a_bug_in_a_run_keeps_its_traceback():
    with pytest.raises(TypeError, match='unexpected'), named_mistakes('', Config(dict(model=dict(type='RecNeXt')))):
        load_config(path=None, nothing=1)


def test_a_magnitude_that_varies_without_end_is_sound(scenes):
    """mmpretrain's RandAugment takes it as a text."""
    pytest.importorskip('mmpretrain.datasets')
    policy = dict(type='mmpretrain.Posterize', magnitude_range=(4, 0))
    step = dict(
        type='mmpretrain.RandAugment', policies=[policy], num_policies=1, magnitude_level=9, magnitude_std='inf'
    )
    cfg = load_config(config_of('m3'))
    cfg.train_dataloader.dataset.pipeline[3] = step
    check_keys(cfg)
    assert TRANSFORMS.build(cfg.train_dataloader.dataset.pipeline[3]).magnitude_std == 'inf'


def test_a_mistake_in_a_file_is_named_too(scenes, tmp_path):
    config = write_tiny_config(tmp_path, scenes, "model['neck']['out_chanels'] = 16")
    with pytest.raises(UserError, match=r'model\.neck\.out_chanels is unknown.*mean out_channels'):
        run_train(str(config), TrainOptions(str(tmp_path / 'work')))
    with pytest.raises(UserError, match=r'model\.neck\.out_chanels is unknown'):
        run_test(str(config), 'none.pth', TestOptions(str(tmp_path / 'work')))
    assert not (tmp_path / 'work').exists()


MISFITS = [
    ("model['neck']['in_channels'] = [8, 16, 32, 65]", 'model.neck does not fit: model.backbone gives 8, 16, 32, 64'),
    ("model['neck']['in_channels'] = [8, 16, 32]", 'model.neck does not fit'),
    ("model['decode_head']['in_channels'] = [16, 16, 16, 8]", 'model.decode_head does not fit: model.neck gives 16'),
    ("train_pipeline[2]['crop_size'] = (16, 16)", 'Training cuts images to 16 × 16, and a cell'),
    ("train_pipeline[2]['crop_size'] = (64, 31)", 'Set crop_size in train_dataloader.dataset.pipeline to 32 or more'),
    ("model['decode_head']['num_classes'] = 27", 'The train set has 150 classes, the network 27'),
]


@pytest.mark.every(2)
@pytest.mark.parametrize(('line', 'words'), MISFITS, ids=lambda value: str(value)[:40])
def test_parts_that_do_not_fit(scenes, tmp_path, line, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        run_train(str(write_tiny_config(tmp_path, scenes, line)), TrainOptions(str(tmp_path / 'work')))
    assert len(str(caught.value).splitlines()) <= 2 and not (tmp_path / 'work').exists()


def test_a_batch_that_norms_cannot_be_trained_on(scenes, tmp_path):
    """Of one image of 32 × 32 the last stage has one value a channel."""
    lines = "model['data_preprocessor'].update(size=(32, 32))\ntrain_pipeline[2]['crop_size'] = (32, 32)\n"
    cfg = load_config(write_tiny_config(tmp_path, scenes, f'{lines}train_dataloader["batch_size"] = 1'))
    meta_model = build_on_meta(cfg.model)
    with pytest.raises(UserError, match=r'model\.backbone cannot be trained on batches of 1 images of 32 × 32.*batch'):
        check_parts_fit(cfg, True, meta_model)
    check_parts_fit(cfg, True, meta_model, 2)  # statistics of two processes together
    cfg.train_dataloader.batch_size = 2
    check_parts_fit(cfg, True, meta_model)


def test_as_a_command(scenes, tmp_path):
    options = ['--work-dir', tmp_path / 'work', '--cfg-options', 'model.backbone.drop_paht_rate=0.1']
    result = run_tool('train', write_tiny_config(tmp_path, scenes), *options)
    assert_user_error(result, 'model.backbone.drop_paht_rate is unknown: RecNeXt takes no drop_paht_rate.')
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(
    ('named', 'imported'),
    [
        ('projects.recnext.recnext', 'openmmlab'),
        ('projects.recnext.recnext.engine.hooks.deploy', 'openmmlab'),
        ('projects.recnext.recnext.models.classifier', 'openmmlab.classifier'),
        ('projects.recnext.recnext.timm', 'timm'),
        ('projects.recnext.recnext.openmmlab.hooks', 'openmmlab.hooks'),
    ],
)
def test_modules_of_older_configs_are_imported_by_the_names_of_today(tmp_path, named, imported):
    config = write_tiny_config(tmp_path, tmp_path, f'custom_imports = dict(imports={named!r})')
    assert load_config(config).custom_imports.imports == [f'projects.recnext.recnext.{imported}']
    assert f'projects.recnext.recnext.{imported}' in sys.modules


def test_a_module_that_is_not_there_is_an_error(tmp_path):
    config = write_tiny_config(tmp_path, tmp_path, "custom_imports = dict(imports='projects.recnext.recnext.my_hooks')")
    with pytest.raises(UserError, match='my_hooks'):
        load_config(config)


def test_a_network_whose_weights_were_averaged_is_tested_folded(scenes, tmp_path):
    """The checkpoint has the averages as the network's weights: EMAHook would swap them with an unfolded copy."""
    extra = "custom_hooks = [dict(type='EMAHook', momentum=0.5)]"
    config, work = write_tiny_config(tmp_path, scenes, extra), str(tmp_path / 'work')
    run_train(str(config), TrainOptions(work, cfg_options={'train_cfg.max_iters': 2}))
    options = [TestOptions(work, deployment=Deployment(fuse=fuse)) for fuse in ('all', 'none')]
    folded, plain = (run_test(str(config), f'{work}/iter_2.pth', option) for option in options)
    assert folded == pytest.approx(plain, abs=0.02)
