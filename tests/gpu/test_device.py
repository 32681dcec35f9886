"""What has to hold on every kind of device, of the one that ``--device`` names.

On a CPU these are few cases and small networks, so that the tests themselves are tried, and ``--full`` tries them all
but those of CUDA.
"""

import copy
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.exports import SIZE as EXPORTED
from helpers.exports import export_to, picture, pixels
from helpers.exports import write_tiny as write_exportable
from helpers.logits import assert_same, cases, in_layout, make_logits, stock
from helpers.reference import config_of
from helpers.scripts import run
from helpers.segmentors import (
    BOUNDS,
    deviation,
    head_logits,
    pair,
    raw_images,
    recnext_cfg,
    sample_of,
    smooth_images,
    step,
)
from helpers.tiny import write_tiny_config
from helpers.tools import run_tool
from hypothesis import given, settings
from mmengine.model import convert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmseg.models import EncoderDecoder
from torch import distributed, nn

from projects.recnext.recnext.benchmarks.training import random_batch
from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.export.coreml import CoreMLBackend, open_model
from projects.recnext.recnext.models import label_map as module
from projects.recnext.recnext.models.label_map import label_map
from projects.recnext.recnext.openmmlab.builder import build_without_weights
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.openmmlab.distributed import backend_of, can_sync_norms
from projects.recnext.recnext.openmmlab.hooks import compile_for_training
from projects.recnext.recnext.openmmlab.loops import use_bfloat16
from projects.recnext.recnext.openmmlab.segmentor import FastEncoderDecoder
from projects.recnext.recnext.predict.predictor import Predictor
from projects.recnext.recnext.runtimes.cuda_graph import GraphedNetwork
from projects.recnext.recnext.runtimes.deployment import DTYPES, Deployment, deploy
from projects.recnext.recnext.utils.devices import single_precision

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures('full_precision')]


@pytest.fixture
def full_precision():
    """float32 as on a CPU, but where a test says otherwise."""
    with single_precision(tf32=False):
        yield


@pytest.fixture
def accelerator(device, full) -> torch.device:
    """For what other tests show of a CPU already; on one, these show that they work."""
    if device.type == 'cpu' and not full:
        pytest.skip('needs an accelerator: of a CPU other tests show the same (--full runs this one too)')
    return device


@pytest.fixture
def cuda(device) -> torch.device:
    if device.type != 'cuda':
        pytest.skip('needs a GPU of NVIDIA')
    return device


# --- Label maps ---


def test_labels_of_adversarial_logits_are_those_of_mmseg(device):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, *([] if device.type == 'mps' else [torch.float64])]

    @settings(max_examples=20 if device.type == 'cpu' else 500, deadline=None)
    @given(case=cases(dtypes=dtypes))
    def check(case):
        *how, layout, seed, steps = case
        logits = in_layout(make_logits(*how, seed).to(device), layout, seed)
        expected = stock(logits, steps)
        for most in (module.MOST, 1):
            with mock.patch.object(module, 'MOST', most):
                labels = label_map(logits, steps)
            assert labels.device == logits.device
            assert_same(labels, expected, f'MOST={most}')

    check()


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_labels_of_a_segmentor_are_those_of_mmseg(device, mode):
    stock_model, ours = (model.to(device) for model in pair(recnext_cfg(19, mode=mode)))
    for size, original in (((96, 128), (96, 128)), ((64, 96), (150, 217)), ((128, 64), (67, 31))):
        images, samples = raw_images([size, size]), [sample_of(size, ori_shape=original)] * 2
        expected, found = (step(model, images, samples) for model in (stock_model, ours))
        for theirs, mine in zip(expected, found):
            assert mine.pred_sem_seg.data.device.type == device.type
            assert torch.equal(mine.pred_sem_seg.data, theirs.pred_sem_seg.data)


def test_labels_of_real_images_are_those_of_mmseg(accelerator, real_m3, ade20k_sample):
    """Unfolded in every pixel; in the form that is tested by default, which adds in another order, in all but a few."""
    plain = Predictor('recnext_m3_ade20k', real_m3, accelerator, Deployment('none', channels_last=False))
    folded = Predictor('recnext_m3_ade20k', real_m3, accelerator)
    different = seen = 0
    for photo in sorted(ade20k_sample.rglob('*.jpg')):
        # mmseg's resizing and argmax of all classes, behind the same network.
        with mock.patch.object(FastEncoderDecoder, 'predict', EncoderDecoder.predict):
            expected = plain(photo).labels
        assert (plain(photo).labels == expected).all(), photo.name
        different += int((folded(photo).labels != expected).sum())
        seen += expected.size
    assert seen == 651_696 and different <= 1e-5 * seen


# --- Forms and precisions ---


@pytest.mark.parametrize('precision', DTYPES)
def test_folded_is_plain_and_precisions_are_within_their_bounds(device, precision):
    ours = pair(recnext_cfg(19))[1].to(device)
    images = smooth_images(2).to(device)
    expected = head_logits(ours, images)
    deploy(ours, Deployment(precision=precision))
    logits, (close, agree) = head_logits(ours, images), BOUNDS[DTYPES[precision]]
    assert logits.device.type == device.type and logits.dtype is torch.float32
    assert deviation(logits, expected) < close
    assert (logits.argmax(1) == expected.argmax(1)).double().mean() >= agree


def test_logits_are_those_of_a_cpu(accelerator):
    ours = pair(recnext_cfg(19))[1]
    images = smooth_images(2)
    expected = head_logits(ours, images)
    assert deviation(head_logits(ours.to(accelerator), images.to(accelerator)).cpu(), expected) < 1e-4


def test_a_compiled_network_gives_the_same_logits(accelerator):
    ours = pair(recnext_cfg(19))[1].to(accelerator)
    images = smooth_images(2).to(accelerator)
    expected = head_logits(ours, images)
    deploy(ours, Deployment(engine='compile'))
    assert deviation(head_logits(ours, images), expected) < 1e-4


def test_a_network_in_a_cuda_graph_gives_the_same_logits(cuda):
    ours = pair(recnext_cfg(19))[1].to(cuda)
    deploy(ours)
    graphed = GraphedNetwork(ours.forward_logits)
    with torch.no_grad():
        found, expected = [], []
        for seed, size in enumerate([(96, 128), (64, 64), (96, 128), (64, 64), (96, 128), (64, 64)]):
            images = smooth_images(2, size, seed).to(cuda)
            found.append(graphed(images))
            expected.append(ours.forward_logits(images))
        assert len(graphed._graphs) == 2
        # All of them at the end: none was overwritten by a later one.
        assert all(deviation(*both) < 1e-6 for both in zip(found, expected))


def test_threads_have_graphs_of_their_own(cuda):
    ours = pair(recnext_cfg(19))[1].to(cuda)
    deploy(ours)
    graphed = GraphedNetwork(ours.forward_logits)
    images = [smooth_images(2, seed=seed).to(cuda) for seed in range(40)]
    expected = [head_logits(ours, one) for one in images]
    torch.cuda.synchronize()

    def run_one(one: torch.Tensor) -> torch.Tensor:
        logits = graphed(one)
        torch.cuda.current_stream().synchronize()
        return logits

    with ThreadPoolExecutor(2, initializer=lambda: torch.cuda.set_stream(torch.cuda.Stream())) as workers:
        found = list(workers.map(run_one, images))
    assert all(deviation(*both) < 1e-6 for both in zip(found, expected))


# --- Training ---


@pytest.fixture
def tiny_training(tmp_path, scenes) -> Path:
    # What is dropped is drawn by a generator of the device's.
    return write_tiny_config(
        tmp_path, scenes, 'model["backbone"]["drop_path_rate"] = model["decode_head"]["dropout_ratio"] = 0'
    )


@pytest.mark.parametrize(
    ('amp', 'channels_last', 'compiled'),
    [(False, False, False), (True, True, False), (True, True, True)],
    ids=['fp32', 'bf16, channels last', 'bf16, channels last, compiled'],
)
def test_training_steps_are_finite(device, full, tiny_training, amp, channels_last, compiled):
    if compiled and device.type == 'cpu' and not full:
        pytest.skip('needs an accelerator: of a CPU other tests show the same (--full runs this one too)')
    cfg = load_config(tiny_training, dict(crop_size=(64, 64)))
    if amp:
        use_bfloat16(cfg)
    torch.manual_seed(0)
    model = build_without_weights(cfg.model)
    model.init_weights()
    batch = random_batch(cfg, 4)
    first = _loss(copy.deepcopy(model).train(), batch)
    model.to(device).train()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compiled:
        # For a CPU the compiler itself takes minutes.
        compile_for_training(model, backend='aot_eager' if device.type == 'cpu' else 'inductor')
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    losses = [float(model.train_step(copy.deepcopy(batch), optim_wrapper)['loss']) for _ in range(3)]
    assert losses[0] == pytest.approx(first, rel=0.02 if amp else 1e-4)  # the CPU's, in float32
    assert np.isfinite(losses).all() and losses[2] < losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def _loss(model: nn.Module, batch: dict) -> float:
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    return model.parse_losses(model(**data, mode='loss'))[0].item()


def test_synchronised_norms_in_one_process(device):
    if not can_sync_norms(device):
        pytest.skip(f'needs a device for which PyTorch has SyncBatchNorm; {device} is none')
    distributed.init_process_group(backend_of(device), store=distributed.HashStore(), rank=0, world_size=1)
    try:
        ours = pair(recnext_cfg(19, head=dict(dropout_ratio=0)))[1].to(device).train()
        images = smooth_images(2).to(device)
        expected = ours.forward_logits(images)
        synchronised = convert_sync_batchnorm(copy.deepcopy(ours), 'torch')
        assert any(isinstance(part, nn.SyncBatchNorm) for part in synchronised.modules())
        logits = synchronised.network(images)
        logits.sum().backward()
        total = logits.detach().clone()
        distributed.all_reduce(total)
        assert deviation(logits, expected) < 1e-5 and torch.equal(total, logits)
    finally:
        distributed.destroy_process_group()


def test_synchronised_norms_in_several_processes(accelerator, tiny_training, tmp_path):
    if accelerator.type != 'cpu' and torch.accelerator.device_count() < 2:
        pytest.skip('needs two accelerators')
    work = tmp_path / 'work'
    run('dist_train.sh', tiny_training, 2, '--work-dir', work, '--cfg-options', 'sync_bn=torch', fresh=True)
    assert all(tensor.isfinite().all() for tensor in read_checkpoint(work / 'iter_8.pth')['state_dict'].values())


def test_a_resumed_training_goes_on(accelerator, tiny_training, tmp_path):
    """On a CPU bit for bit; elsewhere sums are not always taken in the same order, and AdamW makes steps of the
    learning rate out of gradients that are all rounding."""
    for options in (['--cfg-options', 'train_cfg.max_iters=4'], ['--resume']):
        result = run_tool('train', tiny_training, '--work-dir', tmp_path / 'work', *options, fresh=True)
        assert result.returncode == 0, result.stderr
    whole = run_tool('train', tiny_training, '--work-dir', tmp_path / 'whole', fresh=True)
    assert whole.returncode == 0, whole.stderr
    losses, weights = {}, {}
    for work, iteration in (('work', 8), ('whole', 8), ('whole', 4)):
        state = read_checkpoint(tmp_path / work / f'iter_{iteration}.pth')['state_dict']
        weights[work, iteration] = torch.cat([tensor.double().flatten() for tensor in state.values()])
        lines = [json.loads(line) for log in (tmp_path / work).rglob('scalars.json') for line in log.open()]
        losses[work] = {line['step']: line['loss'] for line in lines if 'loss' in line}
    # The same images, the same weights: the first loss after resuming is that of the undisturbed run.
    assert losses['work'][5] == pytest.approx(losses['whole'][5], rel=1e-3)
    moved = (weights['whole', 8] - weights['whole', 4]).norm()
    assert (weights['work', 8] - weights['whole', 8]).norm() < moved / 5


# --- Exports ---


def test_an_exported_file_gives_the_labels_of_the_device(accelerator, tmp_path):
    source = write_exportable(tmp_path, 'conv')
    export_to(tmp_path / 'a.mlpackage', CoreMLBackend(precision='fp32'), source, size=[EXPORTED])
    image = picture(EXPORTED)
    labels = open_model(tmp_path / 'a.mlpackage')(pixels(image))['labels']
    predictor = Predictor(*source, accelerator)
    found = predictor.segmentor.test_step(
        dict(inputs=[torch.from_numpy(image.transpose(2, 0, 1).copy())], data_samples=[sample_of(EXPORTED)])
    )
    assert (labels == found[0].pred_sem_seg.data[0].cpu().numpy()).mean() > 0.999


# --- The command ---


@pytest.mark.parametrize('options', [[], ['--overlap']], ids=str)
def test_the_tool_tests_on_the_device(accelerator, real_m3, ade20k_sample, tmp_path, options):
    result = run_tool(
        'test', config_of('m3'), real_m3, '--data-root', ade20k_sample, '--work-dir', tmp_path / 'work',
        '--device', accelerator, *options, fresh=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert 'mIoU: 38.6' in result.stdout
