"""Prediction for collections of any size: shared out among processes, and continued where it was interrupted.

Of several processes each predicts every n-th input, and skips what is finished. They wait for each other in the end.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ..openmmlab.distributed import get_process_info, wait_for_others
from ..runtimes.deployment import DEFAULT, Deployment
from ..utils.devices import AUTO, find_device
from ..utils.errors import UserError
from ..utils.images import ImageError, pixels_in_header, quieten
from ..utils.parallel import completed
from ..utils.progress import image_progress
from .batch_inputs import Input, find_inputs
from .batch_outputs import Outputs
from .predictor import Prediction, Predictor, PreparedImage

LARGE = 2**24
"""Pixels above which an image is neither read ahead nor written behind: one of these is in memory at a time."""

THREADS = 2, 8
"""The least and the most that read; as many write."""

MAX_LISTED = 10
"""Classes and failures that are printed. The summary has all."""


def infer(
    config: str,
    checkpoint: str,
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    overlay: bool = True,
    deployment: Deployment = DEFAULT,
    batch_size: int | None = None,
    device: str = AUTO,
    cfg_options: dict | None = None,
    launcher: str = 'none',
) -> dict | None:
    """Predict files; see ``recnext predict --help``.

    Args:
        config: Path of the config, or the name of a release.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        inputs: Images, folders, patterns and videos; see :func:`batch_inputs.find_inputs`.
        out_dir: Folder of the outputs; see :mod:`batch_outputs`.
        overlay: Whether to draw overlays.
        deployment: The form in which the network is run.
        batch_size: Images in a batch (default: 1); those of one size go through the network together.
        device: See :func:`device.find_device`; several processes share the devices of a kind.
        cfg_options: Merged into the config.
        launcher: What started the processes: ``'none'``, ``'pytorch'`` (torchrun) or ``'slurm'``.

    Returns:
        The summary, from the first process; see :meth:`batch_outputs.Outputs.summarise`.

    Raises:
        UserError: what is missing or does not fit, before anything is written; or, in the end, that inputs could not
            be predicted.
    """
    process = get_process_info(launcher)
    quieten()
    found = find_inputs(inputs, out_dir)
    where = find_device(device, process.local_rank)
    predictor = Predictor(config, checkpoint, where, deployment, cfg_options)
    outputs = Outputs(out_dir, overlay)
    threads = min(max(torch.get_num_threads(), THREADS[0]), THREADS[1])
    title = f'Process 1 of {process.world_size}' if process.world_size > 1 else 'Predicting'
    with outputs.opened({**predictor.made_with, 'overlay': overlay, 'root': str(found.root)}):
        share = [i for place, i in outputs.not_finished(found) if place % process.world_size == process.rank]
        with image_progress(title, len(share), quiet=process.rank > 0) as advance:
            _predict(predictor, outputs, share, batch_size or 1, threads, advance)
    wait_for_others(launcher)
    if process.rank > 0:
        return None
    left = sum(1 for _ in outputs.not_finished(found)) - len(outputs.failures(found))
    if left:
        raise UserError(
            f'{left} of {len(found)} inputs are not finished: other processes are at work on them, or have died.\n'
            '  For the summary, and for what may be missing, start the same command again.'
        )
    summary = outputs.summarise(found, predictor.classes, threads)
    show_summary(summary, outputs.root)
    return summary


def _predict(
    predictor: Predictor,
    outputs: Outputs,
    items: Iterable[Input],
    batch_size: int,
    threads: int,
    advance: Callable[[int, int], None],
) -> None:
    """Predict inputs: threads read ahead, this one predicts, threads write behind, with few images in memory."""
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        read = completed(readers, functools.partial(_read_ahead, predictor), items, 2 * threads)
        predicted = _predictions(predictor, outputs, read, batch_size, advance)
        for _, written in completed(writers, lambda pair: outputs.save(*pair), predicted, 2 * threads):
            written.result()
            advance(1, 1)


def _read_ahead(predictor: Predictor, item: Input) -> PreparedImage | None:
    """An image, ready for the network; None for what must not be in memory more than once."""
    return None if item.is_video or pixels_in_header(item.path) > LARGE else predictor.prepare(item.path)


def _predictions(
    predictor: Predictor,
    outputs: Outputs,
    read: Iterable[tuple[Input, Future]],
    batch_size: int,
    advance: Callable[[int, int], None],
) -> Iterator[tuple[Input, Prediction]]:
    """What is predicted for the images that were read; failures, videos and large images are dealt with at once."""
    batch: dict[Input, PreparedImage] = {}

    def fail(item: Input, error: ImageError) -> None:
        outputs.fail(item, str(error))
        print(f'failed: {error}', file=sys.stderr, flush=True)
        advance(1, 0)

    def predict_batch() -> Iterator[tuple[Input, Prediction]]:
        try:
            yield from zip(batch, predictor.predict(list(batch.values())))
        except ImageError as error:
            for item in batch:
                fail(item, error)
        batch.clear()

    for item, reading in read:
        try:
            prepared = reading.result()
            if item.is_video:
                outputs.save_video(item, predictor, on_frame=lambda: advance(0, 1))
                advance(1, 0)
            elif prepared is None:
                outputs.save(item, predictor(item.path))
                advance(1, 1)
            else:
                batch[item] = prepared
        except ImageError as error:
            fail(item, error)
        if len(batch) == batch_size:
            yield from predict_batch()
    if batch:
        yield from predict_batch()


def show_summary(summary: dict, out_dir: str | Path) -> None:
    """Print a summary: the largest classes, where the rest is, and what failed as an error."""
    from rich.console import Console
    from rich.table import Table

    table = Table('class', 'share', 'inputs')
    for row in summary['classes'][:MAX_LISTED]:
        table.add_row(row['name'], f'{100 * row["share"]:.1f} %', str(row['inputs']))
    Console().print(table)
    number = len(summary['classes'])
    print(f'{number} classes in {summary["finished"]} of {summary["inputs"]} inputs: {out_dir}/summary.json')
    if summary['failed']:
        reasons = list(summary['failed'].values())
        more = (
            f'\n  and {len(reasons) - MAX_LISTED} more, in {out_dir}/summary.json' if len(reasons) > MAX_LISTED else ''
        )
        raise UserError(
            f'{len(reasons)} of {summary["inputs"]} inputs could not be predicted; the others were.\n  '
            + '\n  '.join(reasons[:MAX_LISTED])
            + more
        )
