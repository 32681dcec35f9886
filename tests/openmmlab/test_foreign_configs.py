"""mmseg's own configs with nothing but ``model.type`` changed: our tools train, resume, test and predict with them.

For speed everything is small: images, crops, iterations, and the widest networks. As on a machine without a network,
nobody's ImageNet weights are asked for.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import mmseg
import numpy as np
import pytest
import torch
from helpers.tools import assert_user_error, run_tool
from mmengine.config import Config, ConfigDict
from PIL import Image

from projects.recnext.recnext.openmmlab.builder import build_on_meta
from projects.recnext.recnext.openmmlab.config import average_augmented, load_config, show_pictures
from projects.recnext.recnext.openmmlab.config_check import check_keys
from projects.recnext.recnext.openmmlab.test import TestOptions
from projects.recnext.recnext.openmmlab.test import test as run_test
from projects.recnext.recnext.openmmlab.train import TrainOptions
from projects.recnext.recnext.openmmlab.train import train as run_train
from projects.recnext.recnext.predict.model import load_deployed
from projects.recnext.recnext.runtimes.deployment import Deployment
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError

CONFIGS = Path(mmseg.__file__).parent / '.mim' / 'configs'
SIZE = (96, 64)
"""Width and height of the images."""

NARROW_RESNET = {
    'model.backbone.stem_channels': 8,
    'model.backbone.base_channels': 8,
    'model.decode_head.in_channels': 64,
    'model.decode_head.channels': 16,
    'model.auxiliary_head.in_channels': 32,
    'model.auxiliary_head.channels': 16,
}
NARROW_SWIN = {
    'model.backbone.embed_dims': 24,
    'model.decode_head.in_channels': [24, 48, 96, 192],
    'model.decode_head.channels': 32,
    'model.auxiliary_head.in_channels': 96,
}
NARROW_VIT = {
    'model.backbone.embed_dims': 48,
    'model.backbone.img_size': (64, 64),
    'model.decode_head.in_channels': [48] * 4,
    'model.decode_head.channels': 32,
    'model.auxiliary_head.in_channels': 48,
}
NARROW_FPN = {
    'model.backbone.depth': 18,
    'model.backbone.stem_channels': 8,
    'model.backbone.base_channels': 8,
    'model.neck.in_channels': [8, 16, 32, 64],
    'model.neck.out_channels': 32,
    'model.decode_head.in_channels': [32] * 4,
    'model.decode_head.channels': 16,
}
NARROW_UNET = {
    'model.backbone.base_channels': 8,
    'model.decode_head.in_channels': 8,
    'model.auxiliary_head.in_channels': 16,
}

NETWORKS = {
    # align_corners, and slide mode
    'fcn/fcn_r18-d8_4xb2-80k_cityscapes-769x769.py': NARROW_RESNET,
    'pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py': NARROW_RESNET,
    'deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py': {
        **NARROW_RESNET,
        'model.decode_head.c1_in_channels': 8,
    },
    'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py': NARROW_SWIN,
    'vit/vit_deit-s16_upernet_8xb2-80k_ade20k-512x512.py': NARROW_VIT,
    'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': {},
    'fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py': {},
    'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py': {
        'model.decode_head.channels': 32,
        'model.auxiliary_head.3.channels': 32,
    },
    'mobilenet_v2/mobilenet-v2-d8_fcn_4xb4-160k_ade20k-512x512.py': {},
    # two classes, a RepeatDataset, another metric, slide mode
    'unet/unet-s5-d16_fcn_4xb4-40k_stare-128x128.py': NARROW_UNET,
    'sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py': NARROW_FPN,
}
"""Configs, and what is changed to make each network small."""

ALWAYS = [config for config in NETWORKS if config.startswith('segformer/')]
"""Tried without ``--full`` as well."""


def write_pair(image: Image.Image, labels: np.ndarray, to: tuple[Path, Path]) -> None:
    for path in to:
        path.parent.mkdir(parents=True, exist_ok=True)
    image.resize(SIZE).save(to[0])
    Image.fromarray(labels.astype(np.uint8)).resize(SIZE, Image.Resampling.NEAREST).save(to[1])


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """The same scenes laid out as ADE20K, Cityscapes and STARE."""
    root = tmp_path_factory.mktemp('data')
    write_dataset(root / 'scenes', training=4, validation=2)
    for path in (root / 'scenes' / 'images').rglob('*.jpg'):
        split = path.parent.name
        short = dict(training='train', validation='val')[split]
        image, scenes = Image.open(path), root / 'scenes'
        labels = np.array(Image.open(scenes / 'annotations' / split / f'{path.stem}.png')).astype(int)
        ade = [root / 'ade20k' / part / split / path.stem for part in ('images', 'annotations')]
        write_pair(image, labels, (ade[0].with_suffix('.jpg'), ade[1].with_suffix('.png')))
        city = f'{path.stem}_leftImg8bit.png', f'{path.stem}_gtFine_labelTrainIds.png'
        folders = [root / 'cityscapes' / part / short / 'town' for part in ('leftImg8bit', 'gtFine')]
        write_pair(image, np.where(labels == 0, 255, labels % 19), tuple(map(Path, folders, city)))
        stare = [root / 'stare' / part / split for part in ('images', 'annotations')]
        write_pair(image, labels % 2, (stare[0] / f'{path.stem}.png', stare[1] / f'{path.stem}.ah.png'))
    return root


def data_of(config: str, data: Path) -> str:
    return str(data / next(name for name in ('ade20k', 'cityscapes', 'stare') if name in config))


def steps_of(cfg: Config, split: str) -> Iterator[tuple[str, ConfigDict]]:
    """The transforms of a split, with their places in the config."""
    dataset, place = cfg[f'{split}_dataloader'].dataset, f'{split}_dataloader.dataset'
    while 'dataset' in dataset:
        dataset, place = dataset.dataset, f'{place}.dataset'
    for index, step in enumerate(dataset.pipeline):
        yield f'{place}.pipeline.{index}', step


def small(config: str) -> dict:
    """The options that make a config small, and its type ours."""
    cfg = Config.fromfile(CONFIGS / config)
    options = {'model.type': 'FastEncoderDecoder', 'model.pretrained': None, **NETWORKS.get(config, {})}
    if cfg.model.backbone.get('init_cfg'):
        options['model.backbone.init_cfg'] = None
    options['model.data_preprocessor.size'] = (64, 64)
    if cfg.model.test_cfg.mode == 'slide':
        options.update({'model.test_cfg.crop_size': (64, 64), 'model.test_cfg.stride': (42, 42)})
    for split in ('train', 'val', 'test'):
        options[f'{split}_dataloader.num_workers'] = 0
        for place, step in steps_of(cfg, split):
            if 'scale' in step:
                options[f'{place}.scale'] = SIZE
            if 'crop_size' in step:
                options[f'{place}.crop_size'] = (64, 64)
    return {
        **options,
        'train_dataloader.batch_size': 2,
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'default_hooks.logger.interval': 1,
        'default_hooks.checkpoint.interval': 1,
        'tta_pipeline.1.transforms': [
            [dict(type='Resize', scale_factor=factor, keep_ratio=True) for factor in (0.5, 1.0)],
            *cfg.tta_pipeline[1].transforms[1:],
        ],
    }


def logged(work_dir: Path) -> list[dict]:
    """What every training in a work dir logged, in order."""
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


@pytest.mark.parametrize(
    'config', [path if path in ALWAYS else pytest.param(path, marks=pytest.mark.full) for path in NETWORKS],
    ids=lambda config: Path(config).stem,
)  # fmt: skip
def test_all_that_our_tools_do(data, tmp_path, config):
    path, root, options = str(CONFIGS / config), data_of(config, data), small(config)
    common = dict(data_root=root, cfg_options=options)
    run_train(path, TrainOptions(str(tmp_path / 'work'), **common))
    (tmp_path / 'work' / 'iter_2.pth').unlink()
    run_train(path, TrainOptions(str(tmp_path / 'work'), resume='auto', **common))
    lines = [line['step'] for line in logged(tmp_path / 'work') if 'loss' in line]
    assert lines == [1, 2, 2]
    checkpoint = str(tmp_path / 'work' / 'iter_2.pth')
    metrics = run_test(
        path, checkpoint, TestOptions(str(tmp_path / 'test'), show_dir=str(tmp_path / 'pictures'), **common)
    )
    assert metrics and all(np.isfinite(value) for value in metrics.values())
    names = sorted(picture.stem for picture in (tmp_path / 'pictures').glob('*.png'))
    assert len(names) == 2
    assert all(Image.open(picture).width == 1350 for picture in (tmp_path / 'pictures').glob('*.png'))
    averaged = run_test(path, checkpoint, TestOptions(str(tmp_path / 'tta'), tta=True, **common))
    assert averaged.keys() == metrics.keys()
    predictor = load_deployed(path, checkpoint, cfg_options=options)
    image = next(Path(root).rglob('*val*/**/*[0-9].[pj]*g'), None) or next(Path(root).rglob('*leftImg8bit.png'))
    prediction = predictor(image)
    assert prediction.labels.shape == SIZE[::-1] and prediction.labels.max() < len(predictor.classes)


def test_the_metrics_are_those_of_mmsegs_own_segmentor(data, tmp_path):
    """The label maps of EncoderDecoder, saved by mmseg's own Runner, and those of our tool."""
    from mmengine.runner import Runner

    config = 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
    options = small(config)
    cfg = load_config(
        CONFIGS / config, {**options, 'model.type': 'EncoderDecoder', 'work_dir': str(tmp_path / 'mmseg')}
    )
    cfg.test_dataloader.dataset.data_root = data_of(config, data)
    cfg.test_evaluator.update(output_dir=str(tmp_path / 'theirs'), keep_results=True)
    cfg.update(dict.fromkeys(('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler')))
    runner = Runner.from_cfg(cfg)
    torch.nn.init.normal_(runner.model.decode_head.conv_seg.weight)
    torch.save(dict(state_dict=runner.model.state_dict()), tmp_path / 'weights.pth')
    theirs = runner.test()
    maps = {path.name: np.array(Image.open(path)) for path in (tmp_path / 'theirs').glob('*.png')}
    assert len(maps) == 2 and all(len(np.unique(labels)) > 1 for labels in maps.values())
    # The same network bit for bit; then as by default, where sums are rounded in another order.
    for deployment, share in ((Deployment(fuse='none', channels_last=False), 0), (Deployment(), 0.001)):
        out = tmp_path / f'ours{share}'
        options_of_test = TestOptions(
            str(tmp_path / 'work'), data_root=data_of(config, data), cfg_options=options, out=str(out),
            deployment=deployment,
        )  # fmt: skip
        ours = run_test(str(CONFIGS / config), str(tmp_path / 'weights.pth'), options_of_test)
        assert ours == theirs if share == 0 else ours == pytest.approx(theirs, abs=0.1)
        for name, labels in maps.items():
            assert (np.array(Image.open(out / name)) != labels).mean() <= share


@pytest.mark.full
def test_as_commands(data, tmp_path):
    """As docs/evaluation.md says it: the type of the model, and for the machine at hand no file from the network."""
    config = CONFIGS / 'segformer' / 'segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
    small_config = tmp_path / 'small.py'
    cfg = load_config(config, {**small(str(config.relative_to(CONFIGS))), 'model.type': 'EncoderDecoder'})
    cfg.dump(small_config)
    options = ['--data-root', data / 'ade20k', '--cfg-options', 'model.type=FastEncoderDecoder']
    trained = run_tool('train', small_config, '--work-dir', tmp_path / 'work', *options)
    assert trained.returncode == 0, trained.stderr
    assert 'learning rate 6e-05. The config does not say for how many its learning rate is.' in trained.stdout
    checkpoint, pictures = tmp_path / 'work' / 'iter_2.pth', tmp_path / 'pictures'
    images = data / 'ade20k' / 'images' / 'validation'
    tested = run_tool(
        'test', small_config, checkpoint, '--work-dir', tmp_path / 'test', '--show-dir', pictures, *options
    )
    assert tested.returncode == 0 and 'mIoU' in tested.stdout, tested.stderr
    assert len(list(pictures.glob('*.png'))) == len(list(images.iterdir()))
    inferred = run_tool('infer', small_config, checkpoint, images, '--out-dir', tmp_path / 'out', *options[2:])
    assert inferred.returncode == 0, inferred.stderr
    scaled = run_tool('train', small_config, '--auto-scale-lr', '--work-dir', tmp_path / 'scaled', *options)
    assert_user_error(scaled, '--auto-scale-lr needs', 'auto_scale_lr = dict(base_batch_size=16)')
    assert not (tmp_path / 'scaled').exists()


OTHERS = (
    'beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py',  # pretrained beside the backbone
    'hrnet/fcn_hr18s_4xb2-40k_cityscapes-512x1024.py',
    'stdc/stdc1_4xb12-80k_cityscapes-512x1024.py',  # an OHEM sampler
    'twins/twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512.py',
)


@pytest.mark.parametrize('config', OTHERS, ids=lambda config: Path(config).stem)
def test_other_configs_are_sound_and_stay_as_they_are(config):
    cfg = load_config(CONFIGS / config, {'model.type': 'FastEncoderDecoder'})
    check_keys(cfg)
    before = cfg.pretty_text
    assert all(parameter.is_meta for parameter in build_on_meta(cfg.model).parameters())
    assert cfg.pretty_text == before


def test_cascades_are_refused():
    config = CONFIGS / 'ocrnet' / 'ocrnet_hr18_4xb2-40k_cityscapes-512x1024.py'
    with pytest.raises(UserError, match=r'decode_head has 2 heads.*\(CascadeEncoderDecoder\)'):
        build_on_meta(load_config(config, {'model.type': 'FastEncoderDecoder'}).model)


def test_what_a_config_lacks_is_left_out_or_named():
    cfg = Config(dict(model=dict(decode_head=dict()), test_dataloader=dict(dataset=dict(pipeline=[]))))
    with pytest.raises(UserError, match='no tta_pipeline'):
        average_augmented(cfg)
    show_pictures(cfg, False, 'pictures', 2)
    assert cfg.default_hooks.visualization.type == 'SegVisualizationHook' and cfg.default_hooks.visualization.draw
    assert cfg.visualizer == dict(type='SegPanelVisualizer', picture_dir='pictures')
    cfg.visualizer = dict(type='Mine')
    show_pictures(cfg, False, 'pictures', 2)
    assert cfg.visualizer == dict(type='Mine', save_dir='pictures')
