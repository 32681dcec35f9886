"""Prediction on a real Ray cluster of three nodes on this machine, which loses nodes and actors while it works."""

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.reference import ROOT
from helpers.tools import descendants, wait_until
from PIL import Image

from projects.recnext.recnext.cli.main import main
from projects.recnext.recnext.predict import ray as ray_prediction
from projects.recnext.recnext.predict import shard_outputs
from projects.recnext.recnext.predict.address_inputs import find_addresses, read_contents
from projects.recnext.recnext.predict.batch_prediction import infer
from projects.recnext.recnext.predict.ray import choose_resources, infer_on_ray
from projects.recnext.recnext.samples.scenes import make_scene
from projects.recnext.recnext.utils.errors import UserError

ray = pytest.importorskip('ray')
parquet = pytest.importorskip('pyarrow.parquet')
pyarrow = pytest.importorskip('pyarrow')

pytestmark = pytest.mark.usefixtures('one_thread')


def write_photos(root: Path, number: int) -> Path:
    scenes = [cv2.resize(make_scene(k)[0], (48, 32)) for k in range(min(number, 30))]
    for k in range(number):
        path = root / f'{k % 7}' / f'{k // 7}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes[k % 30] ^ np.uint8(k // 30)).save(path)
    return root


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def photos(tmp_path_factory, full) -> Path:
    return write_photos(tmp_path_factory.mktemp('photos'), 5000 if full else 60)


@pytest.fixture(scope='module')
def plain(tiny, photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('plain') / 'out'
    infer(*tiny, [photos], out)
    return out


class FaultyStore:
    """A real S3 server whose every third answer about an object is that it has too much to do."""

    def __init__(self, app: Callable) -> None:
        self.app = app
        self.asked = self.refused = 0

    def __call__(self, environ: dict, start: Callable) -> list[bytes]:
        if environ['REQUEST_METHOD'] == 'GET' and environ['PATH_INFO'].endswith(('.png', '.tar', '.json')):
            self.asked += 1
            if self.asked % 3 == 0:
                self.refused += 1
                start('503 Slow Down', [('Content-Type', 'application/xml')])
                return [b'<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>']
        return self.app(environ, start)


@pytest.fixture(scope='module')
def store() -> Iterator[FaultyStore]:
    """Started before the cluster, whose nodes have to know where it is."""
    server = pytest.importorskip('moto.server')
    pytest.importorskip('s3fs')
    from werkzeug.serving import make_server

    faulty = FaultyStore(server.DomainDispatcherApplication(server.create_backend_app))
    listening = make_server('127.0.0.1', 0, faulty, threaded=True)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    names = dict(
        AWS_ENDPOINT_URL=f'http://127.0.0.1:{listening.port}', AWS_ACCESS_KEY_ID='a', AWS_SECRET_ACCESS_KEY='b',
        AWS_DEFAULT_REGION='us-east-1',
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        yield faulty
    listening.shutdown()
    thread.join()


@pytest.fixture(scope='module')
def cluster(request, tmp_path_factory) -> Iterator:
    """A head and two nodes, each of one CPU."""
    # Its nodes know the store by variables, which have to be there before them; without a store they do as well.
    with contextlib.suppress(pytest.skip.Exception):
        request.getfixturevalue('store')
    from ray.cluster_utils import Cluster

    options = dict(num_cpus=1, object_store_memory=100 * 2**20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('RAY_USAGE_STATS_ENABLED', '0')
        head = dict(options, include_dashboard=False)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.options = options
        for _ in range(2):
            cluster.add_node(**cluster.options)
        yield cluster
        cluster.shutdown()


def finished(out: Path) -> int:
    return sum(1 for _ in (out / 'areas').rglob('*.json'))


def actors() -> list[int]:
    """Processes of ours that predict."""
    found = []
    for process in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if b'ray::MapWorker' in Path(f'/proc/{process}/cmdline').read_bytes():
                found.append(process)
    return found


def test_nodes_and_actors_may_go_and_come(cluster, tiny, photos, plain, tmp_path):
    """An actor is killed, a node removed and another added: every output is there once, and as in a plain run."""
    out, happened = tmp_path / 'out', []
    number = len(list(photos.rglob('*.png')))

    command = [sys.executable, ROOT / 'tools' / 'infer.py', *tiny, photos, '--out-dir', out, '--ray', cluster.address]
    # Nodes are added in the main thread alone: they set handlers of signals.
    with (tmp_path / 'said').open('w') as said:
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=said)
    wait_until(lambda: finished(out) > 0 or process.poll() is not None, minutes=60)
    for victim in actors()[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            happened.append(('killed', finished(out)))
    wait_until(lambda: finished(out) > number / 4 or process.poll() is not None, minutes=60)
    cluster.remove_node(next(iter(cluster.worker_nodes)))
    happened.append(('removed', finished(out)))
    cluster.add_node(**cluster.options)
    happened.append(('added', finished(out)))
    assert process.wait(3600) == 0, (tmp_path / 'said').read_text()
    print(happened)
    ours, expected = files(out), files(plain)
    assert ours.pop('failures.csv') == b'input,error\r\n'
    assert ours.keys() == expected.keys() and len(ours) == 3 * number + 2
    assert [name for name in ours if ours[name] != expected[name]] == []
    assert not (out / '.partial').exists()


def test_failures_are_rows_and_what_is_there_is_skipped(cluster, tiny, plain, photos, tmp_path, capsys):
    few, out = write_photos(tmp_path / 'few', 9), tmp_path / 'out'
    (few / '0' / 'bad.png').write_bytes(b'not an image')
    inputs = [few, few / 'missing.png']
    with pytest.raises(UserError, match='2 of 11 inputs could not be predicted'):
        infer_on_ray(*tiny, inputs, out, address=cluster.address)
    assert 'up to 2 actors of 1 CPU each' in capsys.readouterr().out
    with pytest.raises(UserError, match='2 of 11'):
        infer(*tiny, inputs, tmp_path / 'plain')
    ours, expected = files(out), files(tmp_path / 'plain')
    rows = list(csv.reader(io.StringIO(ours.pop('failures.csv').decode())))
    assert rows[0] == ['input', 'error'] and sorted(row[0] for row in rows[1:]) == ['0/bad.png', 'missing.png']
    assert ours == expected
    for name in ('0/bad.png', 'missing.png'):
        Image.fromarray(make_scene(3)[0][:32, :48]).save(few / name)
    times = {path: path.stat().st_mtime_ns for path in (out / 'labels').rglob('*.png')}
    assert infer_on_ray(*tiny, inputs, out, address=cluster.address)['finished'] == 11
    assert '2 of 11 inputs to read' in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == before for path, before in times.items()) and len(times) == 9


def write_tar(path: Path, photos: Path) -> dict[str, str]:
    """A WebDataset shard of photos; the key of each image by its name in the shard."""
    with tarfile.open(path, 'w') as tar:
        for photo in sorted(photos.rglob('*.png')):
            name = str(photo.relative_to(photos))
            tar.add(photo, name)
            label = tarfile.TarInfo(name.replace('.png', '.cls'))
            tar.addfile(label, io.BytesIO())
    return {str(p.relative_to(photos)): str(p.relative_to(photos).with_suffix('')) for p in photos.rglob('*.png')}


@pytest.mark.full
def test_from_shards_to_shards(cluster, tiny, tmp_path):
    few = write_photos(tmp_path / 'few', 9)
    infer(*tiny, [few], tmp_path / 'plain')
    plain = tmp_path / 'plain'
    write_tar(tmp_path / 'a.tar', few)
    names = sorted(path.relative_to(few) for path in few.rglob('*.png'))
    table = pyarrow.table(
        dict(key=[str(n.with_suffix('')) for n in names], image=[(few / n).read_bytes() for n in names])
    )
    parquet.write_table(table, tmp_path / 'b.parquet')
    for source, write in (('a.tar', 'parquet'), ('b.parquet', 'webdataset')):
        out = tmp_path / write
        summary = infer_on_ray(*tiny, [tmp_path / source], out, address=cluster.address, write=write)
        assert summary['finished'] == summary['inputs'] == 9
        found = read_shards(out)
        assert len(found) == 9
        for name in names:
            key = str(name.with_suffix(''))
            ours = found[f'{source[0]}/{key}']
            assert ours['labels'] == (plain / 'labels' / f'{key}.png').read_bytes()
            assert ours['overlay'] == (plain / 'overlays' / f'{key}.jpg').read_bytes()
            areas = json.loads((plain / 'areas' / f'{key}.json').read_text())['areas']
            assert json.loads(ours['report'])['areas'] == areas
        before = files(out)
        (out / 'shards' / 'left.tar').write_bytes(b'half')  # of a run that was killed
        infer_on_ray(*tiny, [tmp_path / source], out, address=cluster.address, write=write)
        assert files(out) == before


def read_shards(out: Path) -> dict[str, dict]:
    """What is in shards, by an independent reader, by key; each only once."""
    rows = []
    for path in sorted((out / 'shards').iterdir()):
        if path.suffix == '.parquet':
            rows += parquet.read_table(path).to_pylist()
        else:
            wds = pytest.importorskip('webdataset')
            for sample in wds.WebDataset(str(path), shardshuffle=False):
                rows.append(
                    dict(key=sample['__key__'], labels=sample['labels.png'], overlay=sample['overlay.jpg'],
                         report=sample['areas.json'])
                )  # fmt: skip
    assert len({row['key'] for row in rows}) == len(rows)
    return {row['key']: row for row in rows}


@pytest.mark.full
def test_an_object_store_with_errors(store, cluster, tiny, tmp_path):
    import s3fs

    few = write_photos(tmp_path / 'few', 14)
    files_of = s3fs.S3FileSystem()
    files_of.mkdir('bucket')
    files_of.put(f'{few}/', 'bucket/photos/', recursive=True)
    infer(*tiny, [few], tmp_path / 'plain')
    infer_on_ray(*tiny, ['s3://bucket/photos'], tmp_path / 'out', address=cluster.address)
    ours, expected = files(tmp_path / 'out'), files(tmp_path / 'plain')
    assert json.loads(ours.pop('run.json'))['root'] == 's3://bucket/photos'
    assert ours.pop('failures.csv') and expected.pop('run.json') and ours == expected
    where = dict(out_dir='s3://bucket/out', write='parquet', address=cluster.address)
    infer_on_ray(*tiny, ['s3://bucket/photos/*/*.png'], **where)
    files_of.invalidate_cache()
    (shard,) = files_of.ls('bucket/out/shards')
    rows = {row['key']: row for row in parquet.read_table(io.BytesIO(files_of.cat_file(shard))).to_pylist()}
    assert len(rows) == 14
    assert all(row['labels'] == expected[f'labels/{key}.png'] for key, row in rows.items())
    assert store.refused > 10


# Without a cluster


@pytest.mark.parametrize(
    ('cluster_of', 'expected'),
    [
        (dict(cpus=1, gpus=0), (1, 0.5, 0, 2)),
        (dict(cpus=2, gpus=0), (1, 1, 0, 2)),
        (dict(cpus=64, gpus=0), (63, 1, 0, 64)),
        (dict(cpus=16, gpus=2), (2, 1, 1, 16)),
        (dict(cpus=16, gpus=2, gpu_share=0.5), (4, 1, 0.5, 16)),
        (dict(cpus=4, gpus=8), (8, 0.37, 1, 8)),
        (dict(cpus=16, gpus=2, device='cpu'), (15, 1, 0, 16)),
        (dict(cpus=2, gpus=0, actors=50), (50, 1, 0, 50)),
    ],
)
def test_a_cpu_is_left_for_reading(cluster_of, expected):
    resources = choose_resources(**cluster_of)
    assert resources == expected
    if 'actors' not in cluster_of:
        assert resources.actors * resources.cpus <= max(cluster_of['cpus'] - 1, cluster_of['cpus'] / 2)


def test_a_cluster_that_cannot_be_meant():
    with pytest.raises(UserError, match='no CPUs'):
        choose_resources(0, 0)
    with pytest.raises(UserError, match='no GPUs'):
        choose_resources(4, 0, 'cuda')


def test_shards_with_bad_contents(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for name in ('../out.png', 'twice.png', 'twice.png', 'done.png'):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b'x'))
    whole = (tmp_path / 'a.tar').read_bytes()
    (item,) = find_addresses([tmp_path / 'a.tar'], tmp_path / 'out').found
    read = list(read_contents(str(item.path), item, lambda key: key == 'a/done'))
    assert [(one.key, one.content) for one in read] == [
        ('a/1', None), ('a/twice', b'x'), ('a/twice~2', b'x'), ('a/done', None),
    ]  # fmt: skip
    assert 'leads out' in read[0].error and read[3].error is None
    (tmp_path / 'a.tar').write_bytes(whole[:1400])
    assert 'cannot be read' in list(read_contents(str(item.path), item))[-1].error
    parquet.write_table(pyarrow.table(dict(a=[b''], b=[b''])), tmp_path / 'two.parquet')
    (item,) = find_addresses([tmp_path / 'two.parquet'], tmp_path / 'out').found
    (one,) = read_contents(str(item.path), item)
    assert one.content is None and '2 columns of bytes' in one.error


@pytest.mark.parametrize(
    ('inputs', 'words'),
    [
        (['a.tar', 'b.png'], '1 of 2 inputs are shards'),
        (['a.mp4'], 'Predict videos without --ray'),
        (['a.png', 's3://b/c.png'], 'Inputs of one kind'),
        (['nosuch://b/c.png'], 'cannot be listed'),
    ],
)
def test_inputs_that_cannot_be_meant(inputs, words, tmp_path):
    with pytest.raises(UserError, match=words):
        find_addresses(inputs, tmp_path)


def test_names_that_webdataset_would_split():
    rows = [dict(key='a.b/c.d%', labels=b'x', overlay=None, report='{}')]
    with tarfile.open(fileobj=io.BytesIO(shard_outputs._as_tar(rows))) as tar:
        assert tar.getnames() == ['a.b/c%2Ed%25.labels.png', 'a.b/c%2Ed%25.areas.json']


def test_without_ray_it_is_said_what_to_install(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(ray_prediction, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'pip install "ray\[data\]"'):
        infer_on_ray(*tiny, [tmp_path], tmp_path / 'out')


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (['--write', 'parquet'], '--write is for --ray'),
        (['--ray', '--launcher', 'slurm'], '--launcher is for'),
        (['--ray', 'photos'], 'inputs come before --ray'),
        (['--ray', '--gpu-share', '2'], 'above 0, up to 1'),
    ],
)
def test_wrong_use(options, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(['predict', 'config', 'a.pth', 'b.png', *options])
    assert end.value.code == 2 and words in capsys.readouterr().err
