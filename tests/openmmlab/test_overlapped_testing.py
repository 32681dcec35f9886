"""The next batch started before the last is measured: the same figures and files, in the same order, and errors."""

import json
from pathlib import Path

import pytest
from helpers.tools import run_tool
from mmseg.evaluation import IoUMetric
from PIL import Image

from projects.recnext.recnext.openmmlab.segmentor import FastEncoderDecoder
from projects.recnext.recnext.openmmlab.test import TestOptions
from projects.recnext.recnext.openmmlab.test import test as run_test
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError


@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    """Of two sizes."""
    root = tmp_path_factory.mktemp('data') / 'scenes'
    write_dataset(root, training=1, validation=7)
    for name in ('images/validation/scene_validation_00002.jpg', 'annotations/validation/scene_validation_00002.png'):
        image = Image.open(root / name)
        image.crop((0, 0, image.width - 40, image.height)).save(root / name)
    return root


@pytest.mark.parametrize(
    'options',
    [pytest.param([], marks=pytest.mark.full), ['--batch-size', 3], pytest.param(['--tta'], marks=pytest.mark.full)],
    ids=str,
)
def test_the_same_figures_and_maps(tiny, scenes, tmp_path, options):
    said, maps, records = {}, {}, {}
    for way in ([], ['--overlap']):
        folder = tmp_path / f'{len(way)}'
        where = ['--data-root', scenes, '--work-dir', folder / 'work', '--out', folder / 'maps']
        result = run_tool('test', *tiny, *where, *options, *way)
        assert result.returncode == 0, result.stderr
        said[len(way)] = [line.split('  data_time')[0].split(' - ')[-1] for line in result.stdout.splitlines()][-1]
        maps[len(way)] = {path.name: path.read_bytes() for path in (folder / 'maps').iterdir()}
        (record,) = (folder / 'work').rglob('evaluation.json')
        records[len(way)] = json.loads(record.read_text())
    assert 'mIoU' in said[0] and said[0] == said[1]
    assert len(maps[0]) == 7 and maps[0] == maps[1]
    assert records[0] == records[1]


def test_a_batch_is_started_before_the_one_before_is_measured(tiny, scenes, tmp_path, monkeypatch):
    said, predict, process = [], FastEncoderDecoder.predict, IoUMetric.process
    monkeypatch.setattr(FastEncoderDecoder, 'predict', lambda *args: (said.append('start'), predict(*args))[1])
    monkeypatch.setattr(IoUMetric, 'process', lambda *args: (said.append('measure'), process(*args))[1])
    run_test(*map(str, tiny), TestOptions(work_dir=str(tmp_path), data_root=str(scenes), overlap=True))
    assert said == ['start', *['start', 'measure'] * 6, 'measure']


def test_what_goes_wrong_with_a_batch_ends_the_test(tiny, scenes, tmp_path, monkeypatch):
    seen = []

    def fail(self, inputs, *_):
        seen.append(inputs.shape)
        raise UserError(f'nothing for {len(seen)}')

    monkeypatch.setattr(FastEncoderDecoder, 'predict', fail)
    with pytest.raises(UserError, match='nothing for 1'):
        run_test(*map(str, tiny), TestOptions(work_dir=str(tmp_path), data_root=str(scenes), overlap=True))
    assert len(seen) == 1
