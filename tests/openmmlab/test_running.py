"""Training and testing as a user runs them: the genuine 0.x numbers, mmseg's own tools, user mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import mmseg
import numpy as np
import pytest
import torch
from helpers.reference import ROOT, SEGMENTOR_CONFIGS, config_of, genuine_maps, shared
from helpers.tiny import write_tiny_config
from helpers.tools import assert_user_error, free_port, run_python, run_tool, wait_until
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmseg.apis import MMSegInferencer
from mmseg.datasets import ADE20KDataset
from mmseg.evaluation import IoUMetric
from mmseg.registry import MODELS
from PIL import Image

from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.checkpoints.keys import ConversionError
from projects.recnext.recnext.openmmlab import train as train_api
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.openmmlab.convert import convert_file
from projects.recnext.recnext.openmmlab.test import TestOptions
from projects.recnext.recnext.openmmlab.test import test as run_test
from projects.recnext.recnext.openmmlab.train import TrainOptions, describe_batch, scale_learning_rate
from projects.recnext.recnext.openmmlab.train import train as run_train
from projects.recnext.recnext.utils.devices import SLOW_IN_16_BITS, lacks_half_precision
from projects.recnext.recnext.utils.errors import UserError

CONFIG = config_of('m3')
DEMO_CONFIG = next(path for path in SEGMENTOR_CONFIGS if 'sample-scenes' in path.name)
CLASSES = ADE20KDataset.METAINFO['classes']
GENUINE = 'aAcc: 88.6900  mIoU: 38.6000  mAcc: 46.7300'


@pytest.fixture(scope='module')
def converted(real_m3, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('converted') / 'm3.pth'
    convert_file(real_m3, path)
    return path


def assert_genuine_maps(folder: Path) -> None:
    maps = genuine_maps()
    assert sorted(path.stem for path in folder.glob('*.png')) == sorted(maps) and len(maps) == 3
    for name, expected in maps.items():
        # IoUMetric saves in the numbering of the annotations, one higher.
        saved = np.array(Image.open(folder / f'{name}.png')).astype(int) - 1
        assert (saved != expected).sum() == 0


@pytest.mark.parametrize('form', [pytest.param('converted', marks=pytest.mark.full), 'raw'])
def test_our_tool_gives_the_genuine_numbers_from_any_directory(request, form, real_m3, ade20k_sample, tmp_path):
    checkpoint = request.getfixturevalue('converted') if form == 'converted' else real_m3
    options = ['--data-root', ade20k_sample, '--out', 'maps', '--show-dir', 'pictures', '--work-dir', 'work']
    result = run_tool('test', CONFIG, checkpoint, *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert GENUINE in result.stdout
    assert ('577 tensors converted in memory' in result.stdout) == (form == 'raw')
    assert_genuine_maps(tmp_path / 'maps')
    for picture in (f'test_{name}.png' for name in genuine_maps()):
        assert Image.open(tmp_path / 'pictures' / picture).width > 1000


@pytest.mark.full  # tests/test_installed.py has it with the wheel
@pytest.mark.parametrize('form', ['converted', 'raw'])
def test_mmsegs_own_tool_gives_them_too(request, form, real_m3, ade20k_sample, tmp_path):
    checkpoint = request.getfixturevalue('converted') if form == 'converted' else real_m3
    tool = Path(mmseg.__file__).parent / '.mim' / 'tools' / 'test.py'
    command = [tool, CONFIG, checkpoint, '--work-dir', tmp_path / 'work', '--out', tmp_path / 'maps']
    command += ['--cfg-options', f'test_dataloader.dataset.data_root={ade20k_sample}']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    result = run_python(*command, fresh=True, timeout=300, env=environment, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert GENUINE in result.stdout
    assert_genuine_maps(tmp_path / 'maps')


@pytest.mark.full
def test_mmsegs_own_tool_is_strict_too(real_m3, ade20k_sample, tmp_path):
    tool = Path(mmseg.__file__).parent / '.mim' / 'tools' / 'test.py'
    command = [tool, config_of('m4'), real_m3, '--work-dir', tmp_path / 'work']
    command += ['--cfg-options', f'test_dataloader.dataset.data_root={ade20k_sample}']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    result = run_python(*command, fresh=True, timeout=300, env=environment, cwd=tmp_path)
    assert result.returncode == 1 and '382 disagreement' in result.stderr


@pytest.mark.parametrize('form', [pytest.param('converted', marks=pytest.mark.full), 'raw'])
def test_inferencer_gives_them_too(request, form, real_m3, ade20k_sample, tmp_path):
    checkpoint = request.getfixturevalue('converted') if form == 'converted' else real_m3
    images = sorted((ade20k_sample / 'images' / 'validation').glob('*.jpg'))
    inferencer = MMSegInferencer(model=str(CONFIG), weights=str(checkpoint), device='cpu')
    assert [name.strip() for name in inferencer.model.dataset_meta['classes']][:3] == ['wall', 'building', 'sky']
    predictions = inferencer([str(path) for path in images], out_dir=str(tmp_path))['predictions']
    for path, prediction in zip(images, predictions):
        assert (prediction != genuine_maps()[path.stem]).sum() == 0
        assert (tmp_path / 'vis' / path.name).exists()


def test_inferencer_is_strict_too(real_m3):
    with pytest.raises(ConversionError, match='382 disagreement'):
        MMSegInferencer(model=str(config_of('m4')), weights=str(real_m3), device='cpu')


def independent_metrics(pairs: list[tuple[np.ndarray, np.ndarray]], num_classes: int) -> dict[str, float]:
    """aAcc, mIoU and mAcc from one confusion matrix; 255 is ignored."""
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for predicted, truth in pairs:
        valid = truth != 255
        np.add.at(confusion, (truth[valid], predicted[valid]), 1)
    right, truth, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid='ignore'):
        iou, accuracy = right / (truth + predicted - right), right / truth
    means = dict(aAcc=right.sum() / confusion.sum(), mIoU=np.nanmean(iou), mAcc=np.nanmean(accuracy))
    return {name: round(100 * value, 2) for name, value in means.items()}


def test_metric_equals_an_independent_computation(ade20k_sample):
    truths = {
        path.stem: np.array(Image.open(path)).astype(np.uint8) - 1  # 0, unlabelled, becomes 255
        for path in sorted((ade20k_sample / 'annotations' / 'validation').glob('*.png'))
    }
    pairs = [(predicted, truths[name]) for name, predicted in genuine_maps().items()]
    MMLogger.get_instance('test_running')
    metric = IoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=CLASSES)
    for predicted, truth in pairs:
        sample = dict(
            pred_sem_seg=dict(data=torch.from_numpy(predicted.astype(np.int64))[None]),
            gt_sem_seg=dict(data=torch.from_numpy(truth.astype(np.int64))[None]),
        )
        metric.process({}, [sample])
    expected = independent_metrics(pairs, 150)
    assert expected == dict(aAcc=88.69, mIoU=38.6, mAcc=46.73)
    assert {name: round(float(value), 2) for name, value in metric.evaluate(3).items()} == expected
    published = json.loads(shared('legacy/real_m3/metrics.json').read_text())
    assert expected == {name: round(100 * published[name], 2) for name in expected}


def losses(work_dir: Path) -> list[float]:
    log = next(work_dir.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [line['loss'] for line in lines if 'loss' in line]


def test_training_learns_then_tests_and_resumes(scenes, tmp_path):
    """Twenty iterations on eight scenes: loss falls, the checkpoint tests, augmented too, and training goes on."""
    work = tmp_path / 'work'
    config = write_tiny_config(tmp_path, scenes, "default_hooks['checkpoint'].update(save_best='mIoU')")
    options = ['--work-dir', work, '--cfg-options', 'param_scheduler=None', 'optim_wrapper.optimizer.lr=0.01']
    first = run_tool('train', config, *options, 'train_cfg.max_iters=20', 'train_cfg.val_interval=20', cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    curve = losses(work)
    assert len(curve) == 20 and np.mean(curve[-3:]) < 0.75 * np.mean(curve[:2])
    tested = run_tool('test', config, work / 'iter_20.pth', '--work-dir', tmp_path / 'test')
    assert tested.returncode == 0, tested.stderr
    validated = [line for line in first.stdout.splitlines() if 'Iter(val)' in line][-1]
    figures = [word.split('data_time')[0].strip() for word in (validated, tested.stdout.splitlines()[-1])]
    assert figures[0].split('aAcc')[1] == figures[1].split('aAcc')[1]
    assert (work / 'best_mIoU_iter_20.pth').exists()
    averaged = run_tool('test', config, work / 'iter_20.pth', '--tta', '--work-dir', tmp_path / 'tta')
    assert averaged.returncode == 0, averaged.stderr
    assert averaged.stdout.splitlines()[-1].split('aAcc')[1] != tested.stdout.splitlines()[-1].split('aAcc')[1]
    resumed = run_tool(
        'train', config, '--resume', *options, 'train_cfg.max_iters=22', 'train_cfg.val_interval=22', cwd=tmp_path
    )
    assert resumed.returncode == 0, resumed.stderr
    assert 'resumed epoch: 0, iter: 20' in resumed.stdout and (work / 'iter_22.pth').exists()


@pytest.mark.full
def test_loss_on_the_three_real_images_falls(ade20k_sample, tmp_path):
    options = dict(
        train_dataloader=dict(num_workers=0, batch_size=2),
        val_dataloader=dict(num_workers=0),
        crop_size=(128, 128),
        model=dict(backbone=dict(init_cfg=None)),
        train_cfg=dict(max_iters=16, val_interval=1000),
        default_hooks=dict(logger=dict(interval=1), checkpoint=dict(interval=1000)),
    )
    cfg = Config.fromfile(CONFIG)
    cfg.merge_from_dict(options)
    for dataset in (cfg.train_dataloader.dataset, cfg.val_dataloader.dataset):
        dataset.data_prefix = dict(img_path='images/validation', seg_map_path='annotations/validation')
    crop = next(step for step in cfg.train_dataloader.dataset.pipeline if step.type == 'RandomCrop')
    crop.crop_size = cfg.model.data_preprocessor.size = (128, 128)
    cfg.optim_wrapper.optimizer.lr = 1e-3
    cfg.dump(tmp_path / 'config.py')
    result = run_tool(
        'train', tmp_path / 'config.py', '--work-dir', tmp_path / 'work', '--data-root', ade20k_sample, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    curve = losses(tmp_path / 'work')
    assert len(curve) == 16 and np.mean(curve[-2:]) < 0.8 * np.mean(curve[:2])


def test_amp_is_bfloat16(scenes, tmp_path):
    config, options = write_tiny_config(tmp_path, scenes), ['--cfg-options', 'train_cfg.max_iters=1']
    result = run_tool('train', config, '--amp', '--work-dir', tmp_path, *options)
    assert result.returncode == 0, result.stderr
    cfg = Config.fromfile(next(tmp_path.glob('*/vis_data/config.py')))
    assert cfg.optim_wrapper.type == 'Bfloat16OptimWrapper'
    assert (SLOW_IN_16_BITS in result.stdout) == lacks_half_precision(torch.device('cpu'))
    assert np.isfinite(losses(tmp_path)).all() and len(losses(tmp_path)) == 1


def test_the_other_options_of_training(scenes, tmp_path):
    options = ['--cfg-options', 'train_dataloader.num_workers=0', 'train_dataloader.batch_size=2']
    options += ['train_cfg.max_iters=2', 'train_cfg.val_interval=5', 'default_hooks.logger.interval=1']
    result = run_tool(
        'train',
        DEMO_CONFIG,
        '--channels-last',
        '--auto-scale-lr',
        '--data-root',
        scenes,
        '--work-dir',
        tmp_path,
        *options,
    )
    assert result.returncode == 0, result.stderr
    assert '2 images per iteration (1 processes x 2), learning rate 0.00075.' in result.stdout
    assert 'The recipe has 4 images; the learning rate is scaled accordingly.' in result.stdout
    assert 'Scaling the original LR by 0.5' in result.stdout and 'images_per_second' in result.stdout
    weight = read_checkpoint(tmp_path / 'iter_2.pth')['state_dict']['neck.fpn_convs.0.conv.weight']
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ('batch', 'processes', 'scale', 'words'),
    [
        (4, 8, False, '32 images per iteration (8 processes x 4), learning rate 0.0001. As in the recipe.'),
        (4, 1, False, 'learning rate 0.0001. The recipe has 32 images; the learning rate is not scaled'),
        (4, 2, True, 'learning rate 2.5e-05. The recipe has 32 images; the learning rate is scaled'),
    ],
)
def test_batch_and_learning_rate_are_said(batch, processes, scale, words):
    cfg = Config.fromfile(CONFIG)
    cfg.train_dataloader.batch_size, cfg.auto_scale_lr.enable = batch, scale
    assert words in describe_batch(cfg, processes)


@pytest.mark.every(3)
@pytest.mark.parametrize('tracker', [dict(tensorboard=True), dict(wandb=''), dict(mlflow='http://localhost')])
def test_a_tracker_must_be_installed(scenes, tmp_path, monkeypatch, tracker):
    monkeypatch.setattr(train_api.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=f'pip install {next(iter(tracker))}'):
        run_train(str(DEMO_CONFIG), TrainOptions(str(tmp_path / 'work'), data_root=str(scenes), **tracker))
    assert not (tmp_path / 'work').exists()


def test_weights_and_biases_offline(scenes, tmp_path):
    pytest.importorskip('wandb')
    config = write_tiny_config(tmp_path, scenes)
    environment = {**os.environ, 'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true'}
    options = ['--work-dir', tmp_path / 'work', '--wandb', 'trial', '--cfg-options', 'train_cfg.max_iters=2']
    result = run_tool('train', config, *options, env=environment)
    assert result.returncode == 0, result.stderr
    (log,) = (tmp_path / 'work').rglob('offline-run-*/*.wandb')
    content = log.read_bytes()
    assert b'trial' in content and b'decode.loss_ce' in content


@pytest.mark.full
def test_mlflow_on_a_server(scenes, tmp_path):
    """A real one, on this machine."""
    mlflow = pytest.importorskip('mlflow')
    pytest.importorskip('mlflow.server.fastapi_app')
    address, folder = f'http://127.0.0.1:{(port := free_port())}', tmp_path / 'server'
    folder.mkdir()
    command = [sys.executable, '-m', 'mlflow', 'server', '--host', '127.0.0.1', '--port', port, '--workers', '1']
    with (folder / 'log').open('w') as log:
        environment = os.environ | dict(MLFLOW_SERVER_ENABLE_JOB_EXECUTION='false')  # whose processes would stay
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True, env=environment)
    try:
        wait_until(lambda: answers(f'{address}/health') or server.poll() is not None)
        config = write_tiny_config(tmp_path, scenes)
        options = ['--work-dir', tmp_path / 'work', '--mlflow', address, '--cfg-options', 'train_cfg.max_iters=2']
        result = run_tool('train', config, *options)
        assert result.returncode == 0, result.stderr
        client = mlflow.MlflowClient(address)
        (run,) = client.search_runs([client.get_experiment_by_name('tiny').experiment_id])
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, 'loss')] == [1, 2]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(address: str) -> bool:
    try:
        with urlopen(address) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_tensorboard_files(scenes, tmp_path):
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    config = write_tiny_config(tmp_path, scenes)
    result = run_tool('train', config, '--work-dir', tmp_path / 'work', '--tensorboard')
    assert result.returncode == 0, result.stderr
    (events,) = (tmp_path / 'work').rglob('events.out.tfevents*')
    log = accumulator.EventAccumulator(str(events))
    log.Reload()
    losses = [event.value for event in log.Scalars('loss')]
    lines = next((tmp_path / 'work').rglob('scalars.json')).read_text().splitlines()
    logged = [json.loads(line)['loss'] for line in lines if 'loss' in json.loads(line)]
    assert len(losses) == 8 and losses == pytest.approx(logged, rel=1e-6)


def test_missing_imagenet_file_stops_before_the_first_iteration(scenes, tmp_path):
    result = run_tool('train', config_of('m4'), '--data-root', scenes, '--work-dir', tmp_path / 'work')
    command = 'python tools/download_checkpoint.py recnext_m4_distill_300e\n'
    assert_user_error(result, command, 'v1.0/recnext_m4_distill_300e.pth', 'model.backbone.init_cfg=None')
    assert 'Iter(train)' not in result.stdout and not (tmp_path / 'work').exists()


def test_options_of_the_network(scenes, tmp_path):
    config = write_tiny_config(tmp_path, scenes, "custom_hooks = [dict(type='DeployHook', precision='fp16')]")
    torch.save(dict(state_dict=MODELS.build(Config.fromfile(config).model).state_dict()), tmp_path / 'tiny.pth')
    options = ['--work-dir', tmp_path / 'work', '--fuse', 'norms', '--precision', 'bf16', '--no-channels-last']
    result = run_tool('test', config, tmp_path / 'tiny.pth', *options, '--batch-size', 2)
    assert result.returncode == 0, result.stderr
    # Three images in two batches; the options win over the config's hook.
    assert 'Iter(test) [2/2]' in result.stdout
    assert re.findall('Network: .*', result.stdout) == ['Network: bf16, folded: norms, contiguous.']


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_missing_data_is_said(tool, real_m3, tmp_path):
    checkpoint = [real_m3] if tool == 'test' else []
    result = run_tool(tool, CONFIG, *checkpoint, '--data-root', tmp_path, '--work-dir', tmp_path / 'work')
    assert_user_error(result, 'does not exist', '--data-root')
    assert not (tmp_path / 'work').exists()


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(real_m3, ade20k_sample, scenes, tmp_path):
    work = tmp_path / 'work'
    result = run_tool('test', config_of('m4'), real_m3, '--data-root', ade20k_sample, '--work-dir', work)
    assert_user_error(result, str(real_m3), 'arch m3', '382 disagreement', '... and 372 more')
    assert not work.exists()
    with pytest.raises(UserError, match='382 disagreement'):
        run_train(
            str(config_of('m4')),
            TrainOptions(str(work), data_root=str(scenes), cfg_options=dict(load_from=str(real_m3))),
        )
    assert not work.exists()


def test_weights_alone_cannot_be_resumed(real_m3, scenes, tmp_path):
    result = run_tool('train', CONFIG, '--resume', real_m3, '--data-root', scenes, '--work-dir', tmp_path / 'work')
    assert_user_error(result, 'no optimizer and no message_hub', 'load_from=')
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize('harm', ['suffix', 'annotation', 'empty'])
def test_a_dataset_that_would_fail_later_is_refused_at_once(scenes, tmp_path, harm):
    data = tmp_path / 'data'
    shutil.copytree(scenes, data)
    image = data / 'images' / 'training' / 'scene_training_00003.jpg'
    if harm == 'suffix':
        for path in image.parent.iterdir():
            path.rename(path.with_suffix('.JPG'))
    elif harm == 'annotation':
        (data / 'annotations' / 'training' / 'scene_training_00003.png').unlink()
    else:
        shutil.rmtree(image.parent)
    words = {'suffix': 'no images', 'annotation': 'lacks 1 of 8 annotations', 'empty': 'does not exist'}[harm]
    with pytest.raises(UserError, match=words):
        run_train(str(DEMO_CONFIG), TrainOptions(str(tmp_path / 'work'), data_root=str(data)))
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        ({'model.backbone.archs': 'm3'}, 'archs'),
        ({'model.type': 'EncoderDecoder'}, 'FastEncoderDecoder'),
        ({'train_pipeline.9.type': 'X'}, '--cfg-options do not fit'),
    ],
)
def test_options_that_do_not_fit_are_named(real_m3, ade20k_sample, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        run_test(
            str(CONFIG),
            str(real_m3),
            TestOptions(str(tmp_path / 'w'), data_root=str(ade20k_sample), cfg_options=options),
        )
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_made_are_named(real_m3, ade20k_sample, tmp_path):
    (tmp_path / 'file').touch()
    result = run_tool(
        'test', CONFIG, real_m3, '--data-root', ade20k_sample, '--work-dir', tmp_path, '--out', tmp_path / 'file'
    )
    assert_user_error(result, str(tmp_path / 'file'), 'folder')


def test_missing_and_broken_configs_are_said(tmp_path):
    with pytest.raises(UserError, match='is a folder'):
        load_config(tmp_path)
    with pytest.raises(UserError, match='No such config'):
        load_config(tmp_path / 'none.py')
    (tmp_path / 'broken.py').write_text('a = = 1')
    with pytest.raises(UserError, match='cannot be read'):
        load_config(tmp_path / 'broken.py')


def test_wrong_use_exits_with_2():
    for args in ([], [CONFIG, 'x.pth', '--cfg-options', 'no-equals-sign']):
        result = run_tool('test', *args, fresh=True)
        assert result.returncode == 2 and 'usage' in result.stderr and 'Traceback' not in result.stderr


def test_a_config_that_says_no_batch_of_its_learning_rate_cannot_scale_it():
    with pytest.raises(UserError, match=r'--auto-scale-lr needs\. Write auto_scale_lr = dict\(base_batch_size=16\)'):
        scale_learning_rate(Config(dict()))
    cfg = Config(dict(auto_scale_lr=dict(base_batch_size=16)))
    scale_learning_rate(cfg)
    assert cfg.auto_scale_lr.enable
