"""What the configs say: names against contents, the released recipe, and that everything in them builds."""

import re

import pytest
import torch
from helpers.reference import ADE20K_CONFIGS, CLASSIFIER_CONFIGS, SEGMENTOR_CONFIGS, SEGMENTORS, config_of
from mmengine.config import Config
from mmseg.registry import DATASETS, TRANSFORMS

from projects.recnext.recnext.checkpoints.releases import find_release
from projects.recnext.recnext.models.recnext import ARCHS
from projects.recnext.recnext.openmmlab.builder import build_on_meta

NAME = re.compile(
    r'fpn_recnext-(?P<arch>\w\d)_(?P<gpus>\d+)xb(?P<batch>\d+)-(?P<iters>\d+k?)_(?P<data>.+)-(?P<h>\d+)x(?P<w>\d+)'
)

by_name = pytest.mark.parametrize('path', SEGMENTOR_CONFIGS, ids=lambda path: path.stem)


def test_there_is_a_config_for_every_released_segmentor_and_the_demo():
    assert [NAME.match(path.stem)['arch'] for path in ADE20K_CONFIGS] == sorted(SEGMENTORS)
    assert len(SEGMENTOR_CONFIGS) == len(SEGMENTORS) + 1
    assert len(CLASSIFIER_CONFIGS) == 2 * len(ARCHS) + 1


@by_name
def test_name_says_what_the_config_does(path):
    cfg, name = Config.fromfile(path), NAME.fullmatch(path.stem)
    iters = int(name['iters'].replace('k', '000'))
    arch = ARCHS[name['arch']]
    crop = (int(name['h']), int(name['w']))
    crops = [step.crop_size for step in cfg.train_pipeline if step.type == 'RandomCrop']
    assert cfg.model.backbone.arch == name['arch']
    assert list(cfg.model.neck.in_channels) == list(arch['channels'])
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end == iters
    assert cfg.train_dataloader.batch_size == int(name['batch'])
    assert cfg.auto_scale_lr.base_batch_size == int(name['gpus']) * int(name['batch'])
    assert cfg.crop_size == cfg.model.data_preprocessor.size == crops[0] == crop and len(crops) == 1
    assert {'ade20k': 'ADEChallengeData2016', 'sample-scenes': 'sample-scenes'}[name['data']] in cfg.data_root
    assert iters % cfg.train_cfg.val_interval == 0 and iters % cfg.default_hooks.checkpoint.interval == 0


@by_name
def test_everything_builds(path):
    cfg = Config.fromfile(path)
    model = build_on_meta(cfg.model).eval()
    assert model.decode_head.num_classes == 150 and model.neck.num_outs == 4
    with torch.device('meta'):
        assert model(torch.empty(1, 3, 64, 96)).shape == (1, 150, 16, 24)
    for pipeline in (cfg.train_pipeline, cfg.test_pipeline, cfg.tta_pipeline):
        for step in pipeline:
            TRANSFORMS.build(step)
    for split in ('train', 'val', 'test'):
        dataset = DATASETS.build({**cfg[f'{split}_dataloader'].dataset, 'lazy_init': True})
        assert len(dataset.metainfo['classes']) == 150
    assert cfg.val_evaluator.type == cfg.test_evaluator.type == 'IoUMetric'
    assert cfg.custom_imports.imports == ['projects.recnext.recnext.openmmlab']


@pytest.mark.parametrize('arch', SEGMENTORS)
def test_released_recipe(arch):
    cfg = Config.fromfile(config_of(arch))
    assert cfg.optim_wrapper == dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05))
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 8000
    assert cfg.sync_bn == 'torch' and cfg.model.backbone.norm_cfg.type == cfg.model.decode_head.norm_cfg.type == 'BN'
    assert cfg.model.backbone.norm_eval is False and cfg.env_cfg.cudnn_benchmark
    assert cfg.train_dataloader.sampler.type == 'ResumableSampler' and cfg.auto_scale_lr.base_batch_size == 32
    steps = {step.type: step for step in cfg.train_pipeline}
    assert list(steps) == [
        'LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop', 'RandomFlip', 'PhotoMetricDistortion',
        'PackSegInputs',
    ]  # fmt: skip
    assert steps['RandomResize'].scale == (2048, 512) and steps['RandomResize'].ratio_range == (0.5, 2.0)
    assert steps['RandomCrop'].cat_max_ratio == 0.75 and steps['RandomFlip'].prob == 0.5
    test = [step.type for step in cfg.test_pipeline]
    assert test == ['LoadImageFromFile', 'Resize', 'ResizeToMultiple', 'LoadAnnotations', 'PackSegInputs']


def test_learning_rate_follows_the_closed_form():
    cfg = Config.fromfile(config_of('m3'))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=cfg.optim_wrapper.optimizer.lr)
    from mmengine.registry import PARAM_SCHEDULERS

    scheduler = PARAM_SCHEDULERS.build({**cfg.param_scheduler[0], 'optimizer': optimizer})
    optimizer.step()
    for iteration in range(1, 80_001):
        scheduler.step()
        if iteration % 10_000 == 0:
            expected = (1e-4 - 1e-6) * (1 - iteration / 80_000) ** 0.9 + 1e-6
            # mmengine arrives one iteration earlier than mmseg 0.x did: two hundred-thousandths of the base rate.
            assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, abs=2e-9)


@pytest.mark.parametrize('arch', SEGMENTORS)
def test_weights_to_start_from_are_released(arch):
    checkpoint = Config.fromfile(config_of(arch)).model.backbone.init_cfg.checkpoint
    release = find_release(checkpoint)
    assert (release['task'], release['arch']) == ('classification', arch)
