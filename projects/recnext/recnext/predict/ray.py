"""Predict on a Ray cluster: Ray Data reads and writes, a pool of actors predicts.

Readers and writers reserve no CPU, so that actors cannot take what they wait for; their number is bounded instead.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..runtimes.deployment import Deployment
from ..utils.devices import AUTO, keep_freed_memory
from ..utils.errors import UserError, first_line
from ..utils.images import IMAGE_SUFFIXES, ImageError, read_image, silence_opencv
from ..utils.paths import PACKAGE
from .files import predict_items, show_summary
from .inputs import VIDEO_SUFFIXES, Input, Inputs, find_inputs
from .model import Model, load_deployed
from .outputs import Outputs, add_up
from .prediction import Prediction

if TYPE_CHECKING:
    import pyarrow
    from fsspec import AbstractFileSystem
    from ray.data import Dataset

PACKAGES = 'ray', 'pyarrow', 'pandas', 'fsspec'
SCHEME = '://'
SHARDS = '.tar', '.parquet'
KEY_COLUMNS = 'key', '__key__', 'name', 'id'  # of Parquet: the first that is there names the images
COLUMNS = dict(
    parquet=('key', 'labels', 'overlay', 'areas', 'error'),
    webdataset=('__key__', 'labels.png', 'overlay.jpg', 'areas.json', 'error.txt'),
)
ROWS_PER_SHARD = 1000  # at least
IMAGES_PER_CALL = 16  # of an actor, at least
THREADS = 4  # of an actor that decode; as many write


@dataclass(frozen=True)
class RayOptions:
    """What every actor loads, which all nodes must find, and what is asked of the cluster."""

    config: str
    checkpoint: str | None
    device: str = AUTO  # or 'cpu', or the kind of accelerator
    deployment: dict = field(default_factory=dict)  # of Deployment, which checks the node that it is made on
    cfg_options: dict | None = None
    overlay: bool = True
    batch_size: int = 1
    address: str = 'local'  # as Ray has it; 'local' is a cluster on this machine for this run alone
    write: str = 'files'  # or a format of COLUMNS
    actors: int | None = None  # at most; None means as many as there is room for now
    gpu_share: float = 1  # of each actor
    folder: str = field(default_factory=os.getcwd)  # where relative paths start

    def load(self) -> Model:
        """Load the model on a node, on the GPU that Ray has given to this process, if any."""
        import ray

        with contextlib.suppress(OSError):
            os.chdir(self.folder)
        keep_freed_memory()
        silence_opencv()
        device = AUTO if ray.get_gpu_ids() else 'cpu'
        return load_deployed(self.config, self.checkpoint, device, Deployment(**self.deployment), self.cfg_options)

    def share_out(self, cpus: float, gpus: float) -> tuple[int, dict]:
        """Return the number of actors, and what each reserves, on a cluster of so many CPUs and GPUs.

        Raises:
            UserError: there is no such device, or nothing to compute on.
        """
        if not cpus or (self.device not in (AUTO, 'cpu') and not gpus):
            raise UserError(f'--device {self.device}: the Ray cluster has {cpus:g} CPUs and {gpus:g} GPUs.')
        if gpus and self.device != 'cpu':
            return self.actors or max(int(gpus / self.gpu_share), 1), dict(num_cpus=0, num_gpus=self.gpu_share)
        return self.actors or max(int(cpus) - 1, 1), dict(num_cpus=1, num_gpus=0)  # a CPU is left for reading


@dataclass(frozen=True)
class RayInputs:
    """Images, or shards of them, that all nodes can read."""

    found: Inputs
    scheme: str  # such as s3://; nothing for files
    filesystem: 'AbstractFileSystem | pyarrow.fs.FileSystem'
    kind: str  # one of SHARDS; nothing for images

    def read(self, items: Sequence[Input], options: dict) -> 'Dataset':
        """Let Ray read items: an image in each row, with the column ``path``."""
        import ray
        from pyarrow import parquet, types

        paths = [str(item.path) for item in items]
        options = dict(options, filesystem=self.filesystem, include_paths=True)
        if self.kind == '.tar':
            images = [f'*{spelt}' for suffix in IMAGE_SUFFIXES for spelt in (suffix, suffix.upper())]
            return ray.data.read_webdataset(paths, decoder=None, fileselect=images, **options)
        if self.kind == '.parquet':
            with _user_errors(paths[0]):
                schema = parquet.read_schema(paths[0], filesystem=self.filesystem)
            images = [one.name for one in schema if types.is_binary(one.type) or types.is_large_binary(one.type)]
            keys = [name for name in KEY_COLUMNS if name in schema.names and name not in images]
            if len(images) != 1 or not keys:
                expected = f'one of bytes, the images, and one that names them: {", ".join(KEY_COLUMNS)}'
                raise UserError(f'{paths[0]} has the columns {", ".join(schema.names)}. Expected {expected}.')
            rows = ray.data.read_parquet(paths, partitioning=None, file_extensions=None, **options)
            return rows.select_columns(['path', *images, keys[0]])
        return ray.data.read_binary_files(paths, **options)


def find_ray_inputs(arguments: Sequence[str | Path], out_dir: str | Path) -> RayInputs:
    """Find what the arguments name: files, or addresses of files, folders and patterns that fsspec knows.

    Raises:
        UserError: nothing is there, inputs of several kinds, or videos.
    """
    from pyarrow.fs import LocalFileSystem

    schemes = {one.partition(SCHEME)[0] + SCHEME if SCHEME in one else '' for one in map(str, arguments)}
    scheme = schemes.pop()
    found, filesystem = _list(arguments) if scheme else (find_inputs(arguments, out_dir), LocalFileSystem())
    suffixes = {item.path.suffix.lower() for item in found}
    shards = suffixes.intersection(SHARDS)
    if schemes or (shards and len(suffixes) > 1):
        raise UserError('Inputs of one kind at a time: files or addresses; images, .tar or .parquet.')
    if not suffixes.isdisjoint(VIDEO_SUFFIXES):
        raise UserError('There are videos among the inputs. Predict them without --ray.')
    return RayInputs(found, scheme, filesystem, ''.join(shards))


def _list(addresses: Sequence[str]) -> tuple[Inputs, 'AbstractFileSystem']:
    filesystem, _ = _file_system(addresses[0])
    folders = defaultdict(set)
    for address in addresses:
        with _user_errors(address):
            for path in filesystem.glob(address) if '*' in address else filesystem.find(address):
                if PurePosixPath(path).suffix.lower() in (*IMAGE_SUFFIXES, *SHARDS):
                    folder, _, name = path.rpartition('/')
                    folders[folder].add(name)
    if not folders:
        raise UserError(f'{" ".join(addresses)}: no images there, and no shards of them (.tar, .parquet).')
    root = os.path.commonpath(folders)
    return Inputs(Path(root), {os.path.relpath(folder, root): names for folder, names in folders.items()}), filesystem


def _file_system(address: str | Path) -> tuple['AbstractFileSystem', str]:
    from fsspec.core import url_to_fs

    with _user_errors(address):
        return url_to_fs(str(address))


@contextlib.contextmanager
def _user_errors(address: str | Path) -> Iterator[None]:
    """Say what keeps an address from being read; an ImportError names the package to install."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f'{address} cannot be read: {first_line(error) or type(error).__name__}') from None


@dataclass(frozen=True, eq=False)
class Content:
    """An image in memory, in the place of an :class:`.Input`."""

    path: str
    name: str
    key: str
    source: bytes
    is_video: bool = False


class _Actor:
    """A model somewhere on the cluster, which writes files, or hands on the rows of shards.

    Args:
        options: What to load.
        outputs: Where to write files; None hands rows on.
        scheme: Of the inputs.
        root: Their innermost folder.
        whole_names: Those of them whose outputs keep the suffix.
    """

    def __init__(
        self, options: RayOptions, outputs: Outputs | None, scheme: str, root: str, whole_names: frozenset[str]
    ) -> None:
        self.options, self.outputs = options, outputs
        self.scheme, self.root, self.whole_names = scheme, root, whole_names
        self.model = options.load()

    def __call__(self, table: 'pyarrow.Table') -> 'pyarrow.Table':
        """Predict the images of a table; return rows for the shards, or the names of what is done."""
        import pyarrow

        self.rows = []
        images = [self._image(row) for row in table.to_pylist()]
        predict_items(self.model, self.outputs or self, images, self.options.batch_size, THREADS, lambda *_: None)
        if self.outputs:
            return pyarrow.table(dict(name=[image.name for image in images], key=[image.key for image in images]))
        text, content = pyarrow.string(), pyarrow.large_binary()
        schema = zip(COLUMNS[self.options.write], (text, content, content, text, text))
        return pyarrow.Table.from_pylist(self.rows, pyarrow.schema(list(schema)))

    def _image(self, row: dict) -> Content:
        path, inside = row.pop('path'), next((str(row[column]) for column in KEY_COLUMNS if column in row), None)
        name = os.path.relpath(path, self.root)
        key = name if name in self.whole_names else os.path.splitext(name)[0]
        content = next((value for value in row.values() if isinstance(value, bytes)), b'')
        if inside is None:
            return Content(self.scheme + path, name, key, content)
        inside = os.path.normpath(f'/{inside}').lstrip('/').replace('\0', '')  # a path that leads out stays inside
        return Content(f'{self.scheme}{path}/{inside}', f'{name}/{inside}', f'{key}/{inside}', content)

    def save(self, item: Content, prediction: Prediction) -> None:
        """Keep a row of what was predicted, in the place of :meth:`.Outputs.save`."""
        overlay = prediction.overlay_jpeg() if self.options.overlay else None
        areas = json.dumps(dict(input=item.name, **prediction.to_dict()), indent=1)
        self._add(item.key, prediction.labels_png(), overlay, areas, None)

    def fail(self, item: Content, reason: str) -> None:
        """Keep a row of why an image could not be predicted."""
        self._add(item.key, None, None, None, reason)

    def _add(self, key: str, *values: str | bytes | None) -> None:
        if self.options.write == 'webdataset':  # what follows the first dot of a file's name is the column there
            folder, slash, stem = key.rpartition('/')
            key = folder + slash + stem.replace('%', '%25').replace('.', '%2E')
        self.rows.append(dict(zip(COLUMNS[self.options.write], (key, *values))))


def predict_on_ray(inputs: Sequence[str | Path], out_dir: str | Path, options: RayOptions) -> dict:
    """Predict files on a Ray cluster, and print a summary.

    Args:
        inputs: See :func:`find_ray_inputs`.
        out_dir: Folder of the outputs, which all nodes must see; with shards also an address.
        options: What to load, and where.

    Returns:
        The summary; see :func:`.outputs.add_up`.

    Raises:
        UserError: something is missing or does not fit, before anything is written; or, in the end, inputs could not
            be predicted.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f'--ray needs packages that are not installed ({", ".join(missing)}): pip install "ray[data]"')
    outputs = Outputs(out_dir, options.overlay) if options.write == 'files' else None
    if outputs and SCHEME in str(out_dir):
        raise UserError(f'{out_dir}: files are written to a folder. To an address, --write parquet or webdataset.')
    if not outputs:
        store, folder = _file_system(out_dir)
        if store.exists(f'{folder}/shards'):
            raise UserError(f'{out_dir} has shards, which are not added to. Choose another folder: --out-dir.')
    inputs = find_ray_inputs(inputs, out_dir)
    with _joined(options.address) as (cpus, gpus):
        import ray

        actors, reserved = options.share_out(cpus, gpus)
        provenance = dict(overlay=options.overlay, root=inputs.scheme + str(inputs.found.root))
        classes, provenance = ray.get(ray.remote(_prepare).options(**reserved).remote(options, outputs, provenance))
        left, failed = _split(inputs, outputs)
        print(f'Ray: up to {actors} actors. {len(left)} of {len(inputs.found)} inputs to read.', flush=True)
        predicted = _predict(inputs, left, options, outputs, actors, reserved) if left else None
        if outputs:
            seen = [Input(Path(), row['name'], row['key']) for row in _rows(predicted)]
            for item, reason in failed.items():
                outputs.fail(item, reason)
            summary = outputs.summarise([*seen, *failed] if inputs.kind else inputs.found, classes, THREADS)
            outputs.close()
        else:
            summary = _write_shards(predicted, options, store, f'{folder}/shards', classes)
            summary['inputs'] += len(failed)
            summary['failed'] |= {item.name: reason for item, reason in failed.items()}
            store.pipe_file(f'{folder}/summary.json', json.dumps(dict(summary, run=provenance), indent=1).encode())
    show_summary(summary, out_dir, options.overlay, shards=outputs is None)
    return summary


def _prepare(options: RayOptions, outputs: Outputs | None, more: dict) -> tuple[list[str], dict]:
    """Make sure on a node that the model loads and the outputs fit; return its classes and what decides the outputs."""
    model = options.load()
    provenance = {**model.provenance, **more}
    if outputs:
        outputs.open(provenance)
    return model.classes, provenance


def _split(inputs: RayInputs, outputs: Outputs | None) -> tuple[list[Input], dict[Input, str]]:
    """Return what is left to read, and why other inputs cannot be: Ray gives up where it cannot open a file."""
    left, failed = [], {}
    skip = outputs and not inputs.kind  # what is in shards, nobody knows before they are read
    for item in (item for _, item in outputs.not_finished(inputs.found)) if skip else inputs.found:
        if inputs.scheme or os.access(item.path, os.R_OK):
            left.append(item)
            continue
        try:
            read_image(item.path)
        except ImageError as error:
            failed[item] = str(error)
    return left, failed


def _predict(
    inputs: RayInputs, left: list[Input], options: RayOptions, outputs: Outputs | None, actors: int, reserved: dict
) -> 'Dataset':
    import ray

    readers = min(max(int(ray.cluster_resources()['CPU']), actors, 2), len(left))
    whole_names = frozenset(item.name for item in left if item.key == item.name)
    return inputs.read(left, dict(num_cpus=0, concurrency=readers)).map_batches(
        _Actor,
        fn_constructor_args=(options, outputs, inputs.scheme, str(inputs.found.root), whole_names),
        batch_size=max(IMAGES_PER_CALL, options.batch_size),
        batch_format='pyarrow',
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=actors, max_size=actors),
        **reserved,
    )


def _write_shards(
    predicted: 'Dataset | None', options: RayOptions, store: 'AbstractFileSystem', shards: str, classes: Sequence[str]
) -> dict:
    """Write shards, and add up what is in them; see :func:`.outputs.add_up`."""
    import ray

    key, _, _, areas, error = COLUMNS[options.write]
    writing = dict(filesystem=store, min_rows_per_file=ROWS_PER_SHARD, ray_remote_args=dict(num_cpus=0))
    rows = None
    if predicted is not None and options.write == 'parquet':
        predicted.write_parquet(shards, **writing)
        rows = ray.data.read_parquet(shards, filesystem=store).select_columns([key, areas, error])
    elif predicted is not None:
        predicted.write_webdataset(shards, encoder=None, **writing)
        parts = [f'*.{areas}', f'*.{error}']
        rows = ray.data.read_webdataset(shards, decoder=None, fileselect=parts, filesystem=store)
    failed = {}

    def of_finished() -> Iterator[list[dict]]:
        for row in _rows(rows):
            reason = row.get(error)  # NaN where WebDataset has none
            if isinstance(reason, str | bytes):
                failed[row[key]] = reason if isinstance(reason, str) else reason.decode()
            else:
                yield json.loads(row[areas])['areas']

    summary = add_up(0, of_finished(), failed, classes)
    return dict(summary, inputs=summary['finished'] + len(failed))


def _rows(dataset: 'Dataset | None') -> Iterator[dict]:
    for table in dataset.iter_batches(batch_size=None, batch_format='pyarrow') if dataset is not None else ():
        yield from table.to_pylist()


@contextlib.contextmanager
def _joined(address: str) -> Iterator[tuple[float, float]]:
    """Use a cluster: one that is there, or one of our own on this machine, of which nothing stays.

    Yields:
        Its CPUs and GPUs.

    Raises:
        UserError: it cannot be reached; or it has given up, or one of its nodes has what a user can put right.
    """
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = sys.stdout.isatty()
    for name in ('ray', 'ray.data'):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The interpreters of the nodes know nothing of a clone.
    paths = os.pathsep.join(filter(None, [str(PACKAGE.parents[2]), os.environ.get('PYTHONPATH')]))
    options = dict(log_to_driver=False, logging_level='error', runtime_env=dict(env_vars=dict(PYTHONPATH=paths)))
    with contextlib.ExitStack() as stack:
        if address == 'local':
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='ray-', ignore_cleanup_errors=True))
            # It answers this machine alone, whatever network that is in.
            options |= dict(include_dashboard=False, _temp_dir=folder, _node_ip_address='127.0.0.1')
        try:
            ray.init(address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f'The Ray cluster {address} cannot be reached: {first_line(error)}') from None
        stack.callback(ray.shutdown)
        total = ray.cluster_resources()
        try:
            yield total.get('CPU', 0), total.get('GPU', 0)
        except (ray.exceptions.RayError, OSError) as error:
            raise _explain(error) from error


def _explain(error: BaseException) -> UserError:
    """Return what a user can put right, from the depth of what Ray raises; else what Ray itself says."""
    found, cause = None, error
    while cause is not None:
        found = cause if isinstance(cause, UserError) else found
        cause = getattr(cause, 'cause', None) or cause.__cause__
    if found is not None:
        return UserError(str(found))
    return UserError(f'Ray has given up: {first_line(error)}\n  Finished files stay: the same command goes on.')
