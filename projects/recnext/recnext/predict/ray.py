"""Prediction on a cluster: Ray Data reads, a pool of actors predicts, and what is lost with a node is made again.

Reading asks for no CPU: actors can never take what a reader waits for, however many nodes are lost.
What asks for nothing Ray starts without limit, each in a process of its own, so the number of readers is bounded.
"""

import contextlib
import csv
import io
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..runtimes.deployment import DEFAULT, Deployment
from ..utils.devices import AUTO
from ..utils.errors import UserError, first_line
from ..utils.images import ImageError, silence_opencv
from ..utils.memory import keep_freed_memory
from ..utils.paths import PACKAGE
from .address_inputs import SCHEME, AddressInputs, find_addresses, read_row
from .batch_inputs import Input
from .batch_outputs import Outputs
from .batch_prediction import show_summary
from .predictor import Prediction, Predictor, PreparedImage
from .shard_outputs import ShardOutputs

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Dataset

MODULES = ('ray', 'pyarrow', 'pandas', 'fsspec')

BLOCKS = 1000
"""About how many tasks read the inputs, and ..."""

NAMES = 8, 256
"""... the least and the most names of one of them."""

LEAST_READERS = 2
"""Tasks that read at once, on a cluster of a single CPU as well."""

AT_ONCE = 16
"""Images that an actor is given at once, at least: what has to be predicted again if it dies."""

SHARD_ROWS = 1000
"""Images of a shard."""

WRITERS = 4
"""Threads of an actor that write what it has predicted."""


WORDS = ('name', 'key', 'error')
"""Columns that say what became of an input."""


class Resources(NamedTuple):
    """What is asked of the cluster."""

    actors: int
    """At most."""
    cpus: float
    """Of each actor."""
    gpus: float
    """Likewise."""
    readers: int
    """Tasks that read at once, at most; they ask for nothing."""

    def __str__(self) -> str:
        share = f'{self.cpus:g} CPU' + (f' and {self.gpus:g} GPU' if self.gpus else '')
        return f'up to {self.actors} actors of {share} each; up to {self.readers} readers, which ask for none'


def choose_resources(
    cpus: float, gpus: float, device: str = AUTO, actors: int | None = None, gpu_share: float = 1
) -> Resources:
    """Share a cluster out.

    Args:
        cpus: That the cluster has.
        gpus: Likewise.
        device: That the network is to run on.
        actors: At most; None means as many as there is room for, with a CPU left for reading.
        gpu_share: What each actor takes of a GPU.

    Raises:
        UserError: there is no such device, or nothing to compute on.
    """
    if cpus <= 0:
        raise UserError('The Ray cluster has no CPUs. Expected a node that was started with some.')
    if device not in (AUTO, 'cpu') and not gpus:
        raise UserError(f'{device}: the Ray cluster has no GPUs. Expected --device cpu, or nodes with GPUs.')
    on_gpu = bool(gpus) and device != 'cpu'
    left = cpus - 1 if cpus >= 2 else cpus / 2
    most = actors or max(int(gpus / gpu_share) if on_gpu else int(left), 1)
    # With more actors than CPUs, as on a machine with many GPUs, each has a part of one.
    share = 1.0 if left >= most or (actors and left >= 1) else int(100 * left / most) / 100
    return Resources(most, share, gpu_share * on_gpu, readers=max(int(cpus), most, LEAST_READERS))


def infer_on_ray(
    config: str,
    checkpoint: str,
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    overlay: bool = True,
    deployment: Deployment = DEFAULT,
    batch_size: int | None = None,
    device: str = AUTO,
    cfg_options: dict | None = None,
    address: str = 'local',
    write: str = 'files',
    actors: int | None = None,
    gpu_share: float = 1,
) -> dict:
    """Predict files on a Ray cluster; see ``recnext predict --help``.

    Args:
        config: Path of the config, or the name of a release; every node must find it there.
        checkpoint: Path or address of the weights, likewise.
        inputs: See :func:`address_inputs.find_addresses`.
        out_dir: Folder of the outputs, which all nodes must see; with shards also an address.
        overlay: Whether to draw overlays.
        deployment: The form in which the network is run.
        batch_size: Images of one size that go through the network together (default: 1).
        device: ``'auto'``, ``'cpu'`` or the kind of accelerator.
        cfg_options: Merged into the config.
        address: Of a cluster, as Ray has it; ``'local'`` starts one on this machine and ends it.
        write: ``'files'`` as :func:`batch_prediction.infer` does, ``'parquet'`` or ``'webdataset'``.
        actors: See :func:`choose_resources`.
        gpu_share: Likewise.

    Returns:
        The summary; see :func:`batch_outputs.add_up`.

    Raises:
        UserError: what is missing or does not fit, before anything is written; or, in the end, that inputs could not
            be predicted.
    """
    missing = [name for name in MODULES if find_spec(name) is None]
    if missing:
        raise UserError(f'--ray needs packages that are not installed ({", ".join(missing)}): pip install "ray[data]"')
    if write == 'files' and SCHEME in str(out_dir):
        raise UserError(f'{out_dir}: files are written to a folder. To an address, --write parquet or webdataset.')
    silence_opencv()
    found = find_addresses(inputs, out_dir)
    # Here as well, on the CPU: what does not fit is said before a cluster is asked for anything.
    predictor = Predictor(config, checkpoint, 'cpu', deployment, cfg_options)
    classes, made_with = predictor.classes, {**predictor.made_with, 'overlay': overlay, 'root': found.root}
    del predictor
    shards = ShardOutputs(out_dir, write) if write != 'files' else None
    outputs = Outputs(out_dir, overlay)
    with contextlib.ExitStack() as stack:
        if shards:
            shards.open({**made_with, 'write': write})
            left = [item for item in found.found if item.key not in shards.finished]
        else:
            stack.enter_context(outputs.opened(made_with))
            left = [item for _, item in outputs.not_finished(found.found)]
        stack.enter_context(_joined(address))
        resources = choose_resources(*_size_of_cluster(), device, actors, gpu_share)
        print(f'Ray: {resources}. {len(left)} of {len(found.found)} inputs to read.', flush=True)
        is_finished = shards.finished.__contains__ if shards else outputs.is_finished
        read = _read(found, left, is_finished, resources.readers)
        actor = dict(config=str(config), checkpoint=str(checkpoint), deployment=deployment, cfg_options=cfg_options)
        predicted = read.map_batches(
            _Actor,
            fn_constructor_kwargs=dict(
                actor, batch_size=batch_size or 1, overlay=overlay, outputs=None if shards else outputs
            ),
            **_pool(resources, batch_size or 1),
        )
        if shards:
            write_shard = partial(_write_shard, ShardOutputs(out_dir, write))
            predicted = predicted.map_batches(
                write_shard, batch_size=SHARD_ROWS, batch_format='pyarrow', **_without_cpus(resources.readers)
            )
        seen, failed = _collect(predicted)
    # Of shards, only reading tells what is in them.
    items = sorted(seen, key=lambda item: item.key) if found.in_shards else found.found
    summary = shards.summarise(len(items), failed, classes) if shards else outputs.summarise(items, classes, WRITERS)
    _write_failures(shards or outputs, summary['failed'])
    show_summary(summary, out_dir)
    return summary


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    """While a cluster is used: one that is there, or one of our own on this machine, of which nothing stays.

    Raises:
        UserError: it cannot be reached; or it has given up, or one of its nodes has what a user can put right.
    """
    os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = sys.stdout.isatty()
    logging.getLogger('ray').setLevel(logging.ERROR)
    logging.getLogger('ray.data').setLevel(logging.ERROR)
    # Of a clone, the nodes' interpreters know nothing.
    paths = os.pathsep.join(filter(None, [str(PACKAGE.parents[2]), os.environ.get('PYTHONPATH')]))
    options = dict(
        log_to_driver=False, logging_level='error', runtime_env=dict(env_vars=dict(PYTHONPATH=paths)),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        if address == 'local':
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='ray-', ignore_cleanup_errors=True))
            # Of its own machine alone, whatever network that is in.
            options |= dict(include_dashboard=False, _temp_dir=folder, _node_ip_address='127.0.0.1')
        try:
            ray.init(address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f'The Ray cluster {address} cannot be reached: {first_line(error)}') from None
        stack.callback(ray.shutdown)
        try:
            yield
        except ray.exceptions.RayError as error:
            raise _explain(error) from error


def _explain(error: BaseException) -> UserError:
    """What a user can put right, from the depth of what Ray raises; else what Ray itself says."""
    import ray

    cause: BaseException | None = error
    while cause is not None:
        inner = getattr(cause, 'cause', None)
        found = next((e for e in (cause, inner) if isinstance(e, UserError)), None)
        if found is not None:
            return UserError(str(inner if isinstance(inner, UserError) else found))
        cause = inner if isinstance(inner, ray.exceptions.RayError) else cause.__cause__
    return UserError(f'Ray has given up: {first_line(error)}\n  What is finished stays; the same command goes on.')


def _size_of_cluster() -> tuple[float, float]:
    import ray

    total = ray.cluster_resources()
    return total.get('CPU', 0), total.get('GPU', 0)


def _read(inputs: AddressInputs, left: Sequence[Input], is_finished: Callable[[str], bool], readers: int) -> 'Dataset':
    """The contents of inputs, as Ray comes to read them."""
    import pyarrow
    import ray

    least, most = NAMES
    size = 1 if inputs.in_shards else min(max(len(left) // BLOCKS, least), most)
    blocks = [left[start : start + size] for start in range(0, len(left), size)] or [[]]
    columns = dict(name=pyarrow.string(), key=pyarrow.string())
    tables = [
        pyarrow.table([[item.name for item in block], [item.key for item in block]], pyarrow.schema(columns))
        for block in blocks
    ]
    read = partial(read_row, inputs.root.rstrip('/'), is_finished if inputs.in_shards else None)
    return ray.data.from_arrow(tables).flat_map(read, **_without_cpus(readers))


def _without_cpus(tasks: int) -> dict:
    """How Ray is to run tasks that ask for nothing: so many at once."""
    import ray

    return dict(num_cpus=0, compute=ray.data.TaskPoolStrategy(size=tasks))


def _pool(resources: Resources, batch_size: int) -> dict:
    """How Ray is to run the actors."""
    import ray

    return dict(
        batch_size=max(AT_ONCE, batch_size),
        batch_format='pyarrow',
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=resources.actors, max_size=resources.actors),
    )


class _Actor:
    """A predictor somewhere on the cluster.

    Args:
        config: As for :class:`Predictor`, and so are the next.
        checkpoint: Weights.
        deployment: Form.
        cfg_options: Changes to the config.
        batch_size: Images that go through the network together.
        overlay: Whether to draw overlays.
        outputs: Where to write; None hands the files on.
    """

    def __init__(
        self,
        config: str,
        checkpoint: str,
        deployment: Deployment,
        cfg_options: dict | None,
        batch_size: int,
        overlay: bool,
        outputs: Outputs | None,
    ) -> None:
        import ray

        keep_freed_memory()
        silence_opencv()
        device = AUTO if ray.get_gpu_ids() else 'cpu'
        self.predictor = Predictor(config, checkpoint, device, deployment, cfg_options)
        self.batch_size = batch_size
        self.overlay = overlay
        self.outputs = outputs

    def __call__(self, contents: 'pyarrow.Table') -> 'pyarrow.Table':
        """Predict images, each a row as of :class:`address_inputs.Content`."""
        import pyarrow

        with ThreadPoolExecutor(WRITERS) as pool:
            rows = [pool.submit(self._finish, *one) for one in self._predict(contents.to_pylist())]
        return pyarrow.Table.from_pylist([row.result() for row in rows], _schema(files=self.outputs is not None))

    def _predict(self, rows: list[dict]) -> Iterator[tuple[dict, Prediction | None, str | None]]:
        batch: list[tuple[dict, PreparedImage]] = []

        def predict_batch() -> Iterator[tuple[dict, Prediction | None, str | None]]:
            try:
                for (row, _), prediction in zip(batch, self.predictor.predict([prepared for _, prepared in batch])):
                    yield row, prediction, None
            except ImageError as error:
                yield from ((row, None, str(error)) for row, _ in batch)
            batch.clear()

        for row in rows:
            content = row.pop('content')
            if content is None:
                yield row, None, row['error']
                continue
            try:
                batch.append((row, self.predictor.prepare(content, row['address'])))
            except ImageError as error:
                yield row, None, str(error)
            if len(batch) == self.batch_size:
                yield from predict_batch()
        if batch:
            yield from predict_batch()

    def _finish(self, row: dict, prediction: Prediction | None, error: str | None) -> dict:
        """Write what was predicted, or hand it on; the row says what became of it."""
        item = Input(Path(row['name']), row['name'], row['key'])
        done = dict(name=item.name, key=item.key, error=error)
        if self.outputs and prediction:
            self.outputs.save(item, prediction)
        elif self.outputs and error:
            self.outputs.fail(item, error)
        elif prediction:
            done['labels'] = prediction.labels_png()
            done['overlay'] = prediction.overlay_jpeg() if self.overlay else None
            done['report'] = json.dumps(dict(input=item.name, **prediction.report()), indent=1)
        return done


def _schema(files: bool) -> 'pyarrow.Schema':
    """Of what an actor hands on: which inputs it is done with, and what is not in files yet."""
    import pyarrow

    columns = {name: pyarrow.string() for name in WORDS}
    if not files:
        columns |= dict(report=pyarrow.string(), labels=pyarrow.large_binary(), overlay=pyarrow.large_binary())
    return pyarrow.schema(columns)


def _write_shard(outputs: ShardOutputs, rows: 'pyarrow.Table') -> 'pyarrow.Table':
    """Write what was predicted into a shard, and hand on the names alone."""
    predicted = [row for row in rows.to_pylist() if row['labels'] is not None]
    if predicted:
        outputs.save(predicted)
    return rows.select(WORDS)


def _collect(predicted: 'Dataset') -> tuple[list[Input], dict[str, str]]:
    """All inputs that were seen, and why some of them could not be predicted."""
    seen, failed = [], {}
    for table in predicted.iter_batches(batch_size=None, batch_format='pyarrow'):
        for name, key, error in zip(*(table.column(column).to_pylist() for column in WORDS)):
            seen.append(Input(Path(), name, key))
            if error is not None:
                failed[name] = error
                print(f'failed: {error}', file=sys.stderr, flush=True)
    return seen, dict(sorted(failed.items()))


def _write_failures(outputs: Outputs | ShardOutputs, failed: dict[str, str]) -> None:
    """A table of what could not be predicted."""
    file = io.StringIO()
    csv.writer(file).writerows([('input', 'error'), *failed.items()])
    outputs.put('failures.csv', file.getvalue().encode())
