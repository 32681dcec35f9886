"""The measurement of an accelerator, tried on the CPU: what it finds, what it leaves out by name, and its picture."""

import json
import time
from dataclasses import replace

import pytest
from helpers.tiny import write_tiny_config
from PIL import Image

from projects.recnext.recnext.benchmarks import gpu
from projects.recnext.recnext.benchmarks.gpu import TINY, Session, benchmark_gpu, list_forms
from projects.recnext.recnext.benchmarks.gpu_tables import name_of
from projects.recnext.recnext.benchmarks.measurement import STAGES
from projects.recnext.recnext.benchmarks.training import COMPILED_WAYS, WAYS
from projects.recnext.recnext.cli.main import main
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gpu')
    write_dataset(folder / 'data', training=2, validation=3)
    return write_tiny_config(folder, folder / 'data')


@pytest.fixture
def time_for_all_but_compiling(monkeypatch):
    monkeypatch.setattr(gpu, 'COMPILING', 10**6)
    return 10**5


@pytest.mark.full
def test_everything_is_measured_or_named(config, tmp_path, time_for_all_but_compiling, monkeypatch, capsys):
    plan = replace(TINY, sizes=TINY.sizes[:1])
    monkeypatch.setattr(gpu, 'TINY', plan)
    seconds = time_for_all_but_compiling
    main(f'benchmark-gpu {config} --tiny --device cpu --seconds {seconds} --work-dir {tmp_path}'.split())
    said = capsys.readouterr().out
    report = json.loads((tmp_path / 'gpu.json').read_text())
    assert not report['failed']
    for point in report['testing']:
        assert set(point['milliseconds']) == set(STAGES) and point['images_per_second'] > 0 < point['first_seconds']
        assert point['pixels'] == point['batch'] * point['size'][0] * point['size'][1]
        if point['precision'] in ('fp32', 'tf32'):  # there is no TF32 on a CPU
            assert point['different_pixels'] == 0
    names = [name_of(point) for point in report['testing']]
    forms = [*list_forms(('eager',)), *list_forms(('contiguous',))]
    assert names == [str(form) for form in forms for _ in plan.batches for _ in plan.sizes]
    assert len(report['whole_tests']) == 2 * len(gpu.SELECTED) and all(
        speed > 0 for speed in report['whole_tests'].values()
    )
    assert list(report['training']) == list(WAYS)
    assert all(0 < profile['busy'] < 1.5 and profile['operations'] for profile in report['profiles'].values())
    compiled = [f'{form}, batch {batch}' for form in list_forms(('compiled',)) for batch in plan.batches]
    assert list(report['skipped']) == ['CUDA graphs', *compiled, *(f'training, {name}' for name in COMPILED_WAYS)]
    assert all(name in said for name in (*names, *WAYS, *report['skipped'])) and 'no time' in said
    with Image.open(tmp_path / 'gpu.png') as picture:
        assert picture.width > 1000


@pytest.mark.full
def test_what_fails_is_named_in_the_end(config, tmp_path, time_for_all_but_compiling, monkeypatch):
    monkeypatch.setattr(gpu, 'PRECISIONS', ('fp32',))
    monkeypatch.setattr(gpu.Testing, 'test_whole', lambda *_: None)
    monkeypatch.setattr(gpu, 'WAYS', {'fp32': {}})
    monkeypatch.setattr(gpu, 'measure_peaks', lambda device: {})
    monkeypatch.setattr(gpu.Testing, 'profile', lambda self, form: 1 / 0)
    with pytest.raises(UserError, match=r'3 of the measurements failed:\n  profile of mmseg, fp32: ZeroDivisionError'):
        benchmark_gpu(str(config), None, 'cpu', time_for_all_but_compiling, tiny=True, work_dir=str(tmp_path))
    report = json.loads((tmp_path / 'gpu.json').read_text())
    assert len(report['failed']) == 3 and list(report['training']) == ['fp32']
    assert [point['different_pixels'] for point in report['testing']] == [0] * 12


def test_too_little_memory_and_too_little_time_are_no_failures(monkeypatch):
    session = Session(100)

    def fill():
        raise RuntimeError('CUDA out of memory. Tried to allocate 90 GiB')

    assert session.attempt('large', fill) is None
    assert session.attempt('small', lambda: 5, needs=90) == 5
    monkeypatch.setattr(gpu, 'monotonic', lambda: time.monotonic() + 20)
    assert session.attempt('long', lambda: 5, needs=90) is None
    assert session.attempt('short', lambda: 5) == 5
    monkeypatch.setattr(gpu, 'monotonic', lambda: time.monotonic() + 101)
    assert session.attempt('late', lambda: 5) is None
    assert session.skipped.keys() == {'large', 'long', 'late'} and not session.failed
    assert session.skipped['late'] == 'no time: 0 of 100 s were left'
