"""Prediction on a real Ray cluster gives what a plain run gives; a bad image or a killed actor costs nothing else."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
from helpers.reference import ROOT
from helpers.tools import descendants, wait_until
from PIL import Image

from projects.recnext.recnext.cli.main import main
from projects.recnext.recnext.predict.files import predict_files
from projects.recnext.recnext.predict.inputs import find_inputs
from projects.recnext.recnext.predict.model import load_deployed
from projects.recnext.recnext.predict.ray import RayOptions, find_ray_inputs, predict_on_ray
from projects.recnext.recnext.samples.scenes import make_scene
from projects.recnext.recnext.utils.errors import UserError

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def installed() -> None:
    pytest.importorskip('ray', reason='needs Ray: pip install "ray[data]"')


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp('photos')
    for k in range(7):
        path = root / f'{k % 2}' / f'{k} #a;b.c%20ü.png'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(cv2.resize(make_scene(k)[0], (48, 32))).save(path)
    Image.open(path).save(path.with_suffix('.jpg'))  # of two that differ in the suffix, outputs keep it
    return root


@pytest.fixture(scope='module')
def plain(tiny, photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('plain') / 'out'
    predict_files(load_deployed(*tiny), find_inputs([photos], out), out)
    return out


@pytest.fixture(scope='module')
def cluster() -> Iterator[str]:
    """The address of a cluster of two CPUs."""
    cluster_utils = pytest.importorskip('ray.cluster_utils', reason='needs Ray: pip install "ray[data]"')
    head = dict(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('RAY_USAGE_STATS_ENABLED', '0')
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        yield cluster.address
        cluster.shutdown()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def write_tar(path: Path, photos: Path) -> Path:
    """A WebDataset shard with photos in it by their numbers, another file of each, and a path that leads out."""
    with tarfile.open(path, 'w') as tar:
        for number, photo in enumerate(sorted(photos.rglob('*.png'))):
            tar.add(photo, f'a.b/{number}.png' if number else '../../0.png')
            tar.add(__file__, f'a.b/{number}.txt' if number else '../../0.txt')
    return path


def test_files_are_those_of_a_plain_run_which_goes_on(cluster, tiny, photos, plain, tmp_path, capsys):
    out, options = tmp_path / 'out', RayOptions(*tiny, address=cluster)
    bad = photos / '0' / 'bad.png'
    bad.write_bytes(b'not an image')
    inputs = [photos, photos / 'missing.png']
    try:
        with pytest.raises(UserError) as error:
            predict_on_ray(inputs, out, options)
        assert 'bad.png is not an image' in str(error.value) and 'missing.png cannot be read' in str(error.value)
        with pytest.raises(UserError) as expected:
            predict_files(load_deployed(*tiny), find_inputs(inputs, out), tmp_path / 'plain')
    finally:
        bad.unlink()
    assert str(error.value) == str(expected.value)
    assert files(out) == files(tmp_path / 'plain')
    before = {path: path.stat().st_mtime_ns for path in out.glob('labels/*/*')}
    (out / 'areas' / next(plain.glob('areas/0/*.json')).relative_to(plain / 'areas')).unlink()
    capsys.readouterr()
    summary = predict_on_ray([photos], out, options)
    assert summary == predict_on_ray([photos], out, options) and summary['finished'] == 8
    assert '0 of 8' in (said := capsys.readouterr().out) and '1 of 8 inputs to read' in said
    assert sum(path.stat().st_mtime_ns != time for path, time in before.items()) == 1 and len(before) == 8
    with pytest.raises(UserError, match='different settings'):
        predict_on_ray([photos], out, RayOptions(*tiny, address=cluster, deployment=dict(fuse='none')))


def test_from_a_shard_to_files(cluster, tiny, photos, plain, tmp_path):
    out = tmp_path / 'deep' / 'out'
    summary = predict_on_ray([write_tar(tmp_path / 'x.tar', photos)], out, RayOptions(*tiny, address=cluster))
    assert summary['finished'] == summary['inputs'] == 7
    labels, expected = files(out / 'labels'), sorted((plain / 'labels').rglob('*ü*'))
    assert sorted(labels) == ['x/0.png', *(f'x/a.b/{number}.png' for number in range(1, 7))]
    pngs = [path.read_bytes() for path in expected if not path.name.endswith('.jpg.png')]
    assert list(dict(sorted(labels.items())).values()) == pngs


@pytest.mark.full
def test_from_addresses_to_parquet_to_webdataset(cluster, tiny, photos, plain, tmp_path):
    from pyarrow import parquet

    for path in photos.rglob('*'):
        if path.is_file():
            (tmp_path / 'in' / path.parent.name).mkdir(parents=True, exist_ok=True)
            (tmp_path / 'in' / path.parent.name / path.name).write_bytes(path.read_bytes())
    (tmp_path / 'in' / '0' / 'bad.png').write_bytes(b'not an image')
    out = tmp_path / 'out'
    options = RayOptions(*tiny, address=cluster, write='parquet', overlay=True)
    with pytest.raises(UserError, match=r'1 of 9 inputs .*\n.*bad\.png is not an image'):
        predict_on_ray([f'file://{tmp_path}/in'], f'file://{out}', options)
    rows = {row['key']: row for row in parquet.read_table(out / 'shards').to_pylist()}
    assert len(rows) == 9 and 'not an image' in rows.pop('0/bad')['error']
    for key, row in rows.items():
        assert row['labels'] == (plain / 'labels' / f'{key}.png').read_bytes() and row['error'] is None
        assert row['overlay'] == (plain / 'overlays' / f'{key}.jpg').read_bytes()
        assert json.loads(row['areas']) == json.loads((plain / 'areas' / f'{key}.json').read_text())
    assert json.loads((out / 'summary.json').read_text())['failed'].keys() == {'0/bad'}
    with pytest.raises(UserError, match='has shards'):
        predict_on_ray([tmp_path / 'in'], out, options)

    table = parquet.read_table(next(out.glob('shards/*'))).select(['key', 'labels']).drop_null()
    parquet.write_table(table, tmp_path / 'b.parquet')
    options = RayOptions(*tiny, address=cluster, write='webdataset', overlay=False)
    assert predict_on_ray([tmp_path / 'b.parquet'], tmp_path / 'tar', options)['finished'] == 8
    webdataset = pytest.importorskip('webdataset')
    samples = list(webdataset.WebDataset(str(next(tmp_path.glob('tar/shards/*'))), shardshuffle=False))
    names = {sample['__key__'].replace('%2E', '.').replace('%25', '%') for sample in samples}
    assert names == {f'b/{key}' for key in rows} and all('labels.png' in sample for sample in samples)


def test_a_killed_actor_loses_nothing_and_no_process_stays(installed, tiny, photos, plain, tmp_path):
    arguments = [*tiny, photos, '--out-dir', tmp_path / 'out', '--ray']
    command = [sys.executable, '-m', 'projects.recnext.recnext', 'predict', *map(str, arguments)]
    said = tmp_path / 'said'
    with said.open('w') as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
    killed = []

    def actor_is_killed() -> bool:
        for child in descendants(process.pid):
            with contextlib.suppress(OSError):
                if b'ray::MapWorker' in Path(f'/proc/{child}/cmdline').read_bytes():
                    os.kill(child, signal.SIGKILL)
                    killed.append(child)
        return bool(killed) or process.poll() is not None

    wait_until(actor_is_killed)
    children = descendants(process.pid)
    assert process.wait(600) == 0 and killed, said.read_text()
    assert files(tmp_path / 'out') == files(plain)
    wait_until(lambda: not any(Path(f'/proc/{child}').exists() for child in children), minutes=1)


def test_what_a_node_lacks_is_asked_on_the_node_alone(cluster, tiny, photos, tmp_path, capsys):
    """The machine that starts a run needs neither the GPU nor the packages of the nodes."""
    nothing = [
        'predict',
        *map(str, tiny),
        str(tmp_path / '*.png'),
        '--ray',
        '--engine',
        'cudagraph',
        '--device',
        'cuda',
    ]
    with pytest.raises(SystemExit, match='Nothing fits'):
        main([*nothing, '--device', 'cuda'])
    options = RayOptions(*tiny, address=cluster, deployment=dict(engine='cudagraph'))
    with pytest.raises(UserError, match=r'^The engine cudagraph runs on an NVIDIA GPU'):
        predict_on_ray([photos], tmp_path, options)
    with pytest.raises(UserError, match='has 2 CPUs and 0 GPUs'):
        predict_on_ray([photos], tmp_path, RayOptions(*tiny, address=cluster, device='cuda'))
    assert not (tmp_path / 'labels').exists()


@pytest.mark.parametrize(
    ('settings', 'cpus', 'gpus', 'expected'),
    [
        (dict(), 1, 0, (1, dict(num_cpus=1, num_gpus=0))),
        (dict(), 64, 0, (63, dict(num_cpus=1, num_gpus=0))),
        (dict(gpu_share=0.5), 16, 2, (4, dict(num_cpus=0, num_gpus=0.5))),
        (dict(device='cuda'), 4, 8, (8, dict(num_cpus=0, num_gpus=1))),
        (dict(device='cpu'), 16, 2, (15, dict(num_cpus=1, num_gpus=0))),
        (dict(actors=50), 2, 0, (50, dict(num_cpus=1, num_gpus=0))),
    ],
)
def test_a_cluster_is_shared_out(settings, cpus, gpus, expected):
    assert RayOptions('config', None, **settings).share_out(cpus, gpus) == expected


@pytest.mark.parametrize('inputs', [['a.tar', 'b.png'], ['a.mp4'], ['a.png', 's3://b/c.png'], ['nosuch://b/c.png']])
def test_inputs_that_cannot_be_meant(installed, inputs, tmp_path):
    with pytest.raises(UserError, match=r'one kind at a time|without --ray|nosuch'):
        find_ray_inputs(inputs, tmp_path)


def test_without_ray_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(UserError, match=r'\(ray.*pip install "ray\[data\]"'):
        predict_on_ray([tmp_path], tmp_path / 'out', RayOptions('config', None))


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--write', 'parquet'], '--write is for --ray'),
        (['--ray', '--share', '1/2'], '--share is for'),
        (['--ray', 'photos'], 'inputs come before --ray'),
        (['--ray', '--gpu-share', '2'], 'above 0, up to 1'),
    ],
)
def test_wrong_use(options, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(['predict', 'config', 'a.pth', 'b.png', *options])
    assert end.value.code == 2 and words in capsys.readouterr().err
