"""The benchmarks, as commands: what they report, not how fast anything is."""

import json
import re

import pytest
import torch
from helpers.tiny import write_tiny_config
from helpers.tools import run_tool
from PIL import Image

from projects.recnext.recnext.benchmarks import measurement
from projects.recnext.recnext.benchmarks.measurement import NETWORK, STAGES, contenders
from projects.recnext.recnext.benchmarks.testing import benchmark
from projects.recnext.recnext.benchmarks.training import benchmark_training
from projects.recnext.recnext.cli.main import main
from projects.recnext.recnext.runtimes.deployment import Deployment
from projects.recnext.recnext.samples.objects import write_objects
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp('benchmark')
    write_dataset(folder / 'data', training=2, validation=3)
    return write_tiny_config(folder, folder / 'data')


CLASSIFIER = 'recnext-m0_1xb32-5e_sample-objects-64x64'


@pytest.fixture(scope='module')
def objects(tmp_path_factory) -> str:
    """A dataset of single objects."""
    folder = tmp_path_factory.mktemp('benchmark') / 'objects'
    write_objects(folder, training=1, validation=1)
    return str(folder)


@pytest.mark.parametrize('lacks', [True, False])
def test_sixteen_bits_only_where_the_processor_has_instructions_for_them(monkeypatch, lacks):
    """And engines only in the precisions that they have."""
    monkeypatch.setattr(measurement, 'lacks_half_precision', lambda device: lacks)
    monkeypatch.setattr('torch._inductor.cpp_builder.get_cpp_compiler', lambda: 'g++')  # whether there is one or not
    chosen = contenders(torch.device('cpu'), ('compile', 'onnxruntime'))
    half = {'ours, bf16', 'ours, bf16, norms only', 'compile, bf16'}
    assert {name for name in chosen if 'bf16' in name} == (set() if lacks else half)
    assert {'compile', 'onnxruntime'} <= chosen.keys()


def test_the_report_of_the_comparison(tiny, tmp_path, full, monkeypatch, capfd):
    chosen = contenders(torch.device('cpu'))
    if not full:
        chosen = {name: way for name, way in chosen.items() if name in ('mmseg', 'ours')}
        monkeypatch.setattr(measurement, 'contenders', lambda *_: chosen)
    main(f'benchmark {tiny} --rounds 1 --copies-at 80 100 --work-dir {tmp_path}'.split())
    said = capfd.readouterr().out
    report = json.loads((tmp_path / 'benchmark.json').read_text())
    assert list(report['contenders']) == list(chosen)
    for name, contender in report['contenders'].items():
        assert name in said
        assert contender['pixels'] == 3 * 80 * 100
        assert contender['images_per_second'] > 0
        assert set(contender['milliseconds']) == set(STAGES)
        assert all(contender['milliseconds'][stage] > 0 for stage in STAGES if stage != 'engine')
        assert set(contender['gflop']) == set(contender['parameters']) == set(NETWORK)
    fp32 = [contender for name, contender in report['contenders'].items() if 'bf16' not in name]
    assert all(contender['different_pixels'] == 0 for contender in fp32)
    assert len({round(contender['mIoU'], 6) for contender in fp32}) == 1
    assert all(
        contender['logit_error'] < (0.1 if 'bf16' in name else 1e-5) for name, contender in report['contenders'].items()
    )
    stock, folded = (report['contenders'][name]['gflop'] for name in ('mmseg', 'ours'))
    assert stock['backbone'] == folded['backbone'] > 0
    with Image.open(tmp_path / 'benchmark.png') as picture:
        assert picture.width > 500


@pytest.mark.full
def test_a_classifier_is_compared_with_mmpretrain(objects, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(measurement, 'contenders', lambda *_: {'mmpretrain': None, 'ours': Deployment()})
    benchmark(CLASSIFIER, data_root=objects, work_dir=str(tmp_path / 'work'), images=3, rounds=1)
    report = json.loads((tmp_path / 'work' / 'benchmark.json').read_text())
    said = capfd.readouterr().out
    for name in ('mmpretrain', 'ours'):
        contender = report['contenders'][name]
        assert re.search(rf'{name} +0 of 3 images different, top1 {contender["top1"]:.2f}', said)
        assert (contender['different_images'], contender['images']) == (0, 3)
        assert all(contender['milliseconds'][stage] > 0 for stage in ('load', 'backbone', 'head', 'metric'))
        assert contender['logit_error'] < 1e-5 and contender['gflop']['backbone'] > 0


def test_other_classes_than_those_of_the_config(objects, tmp_path):
    with pytest.raises(UserError, match='has 8 folders, and the network 1000 classes'):
        benchmark('recnext-m0_8xb256_in1k', data_root=objects, work_dir=str(tmp_path / 'work'))


@pytest.mark.parametrize('option', [dict(sweep=True), dict(copies_at=(64, 64))])
def test_options_of_segmentors(objects, tmp_path, option):
    with pytest.raises(UserError, match='--copies-at and --sweep are for segmentors'):
        benchmark(CLASSIFIER, data_root=objects, work_dir=str(tmp_path / 'work'), **option)
    assert not (tmp_path / 'work').exists()


@pytest.mark.parametrize(
    ('options', 'word'),
    [
        (dict(device='cuda'), 'finds no cuda here'),
        (dict(cfg_options={'model.type': 'EncoderDecoder'}), 'FastEncoderDecoder'),
        (dict(data_root='nowhere'), 'nowhere'),
        (dict(checkpoint='missing.pth'), 'missing.pth'),
    ],
)
def test_what_cannot_be_compared_is_said(tiny, tmp_path, monkeypatch, options, word):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    with pytest.raises(UserError, match=word):
        benchmark(str(tiny), work_dir=str(tmp_path / 'work'), **options)
    assert not (tmp_path / 'work').exists()


def test_a_contender_that_dies_ends_the_benchmark(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, '_compete', _die)
    with pytest.raises(UserError, match="process of 'mmseg' ended"):
        benchmark(str(tiny), work_dir=str(tmp_path))


def _die(*_):
    raise SystemExit(1)


def test_the_table_of_training(tiny):
    result = run_tool('benchmark_training', tiny, '--rounds', 1, '--cfg-options', 'crop_size=(64,64)')
    assert result.returncode == 0, result.stderr
    for way in ('fp32', 'channels last', 'bf16', 'DDP'):
        assert way in result.stdout
    assert result.stdout.count(' ms ') == 5


def test_training_on_an_absent_device(tiny, monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    with pytest.raises(UserError, match='finds no cuda'):
        benchmark_training(str(tiny), device='cuda')
