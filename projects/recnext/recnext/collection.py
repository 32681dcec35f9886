"""Prediction for collections of any size: shared out among processes, and continued where it was interrupted.

The processes never wait for each other. Each has a share of the inputs, and when it is through it helps with what is
left of the others', which may be slow or dead. Two may then predict the same input: its outputs are the same twice.
"""

import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from .ahead import completed
from .distributed import Place, end_last, find_place
from .errors import UserError
from .image_reading import ImageError, count_pixels, quieten
from .inference import Prediction, Predictor, Prepared
from .inputs import Input, Inputs, find_inputs
from .outputs import Outputs
from .progress import image_progress

LARGE = 2**24
"""Pixels above which an image is neither read ahead nor written behind: one of these is in memory at a time."""

THREADS = 2, 8
"""The least and the most that read; as many write."""

SHOWN = 10
"""Classes and failures that are printed. The summary has all."""


def infer(
    config: str,
    checkpoint: str,
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    overlay: bool = True,
    fuse: str = 'all',
    precision: str = 'fp32',
    channels_last: bool = True,
    compile: bool = False,
    batch_size: int | None = None,
    cfg_options: dict | None = None,
    launcher: str = 'none',
) -> dict | None:
    """Predict files; see ``python tools/infer.py --help``.

    Args:
        config: Path of the config, or the name of a release.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        inputs: Images, folders, patterns and videos; see :func:`inputs.find_inputs`.
        out_dir: Folder of the outputs; see :mod:`outputs`.
        overlay: Whether to draw overlays.
        batch_size: Images in a batch (default: 1); those of one size go through the network together.
        launcher: What started the processes: ``'none'``, ``'pytorch'`` (torchrun) or ``'slurm'``.

    The others are those of :func:`launch.test`.

    Returns:
        The summary, from the first process; see :meth:`outputs.Outputs.summarise`.

    Raises:
        UserError: what is missing or does not fit, before anything is written; or, in the end, that inputs could not
            be predicted.
    """
    place = find_place(launcher)
    quieten()
    found = find_inputs(inputs, out_dir)
    gpus = torch.cuda.device_count()
    device = f'cuda:{place.local_rank % gpus}' if gpus else 'cpu'
    predictor = Predictor(config, checkpoint, device, fuse, precision, channels_last, compile, cfg_options)
    outputs = Outputs(out_dir, overlay)
    threads = min(max(torch.get_num_threads(), THREADS[0]), THREADS[1])
    predict = functools.partial(_predict, predictor, outputs, batch_size=batch_size or 1, threads=threads)
    with outputs.opened({**predictor.made_with, 'overlay': overlay, 'root': str(found.root)}):
        _predict_all(predict, outputs, found, place)
        end_last(place)
        if place.rank > 0:
            return None
        left = sum(1 for _ in outputs.not_finished(found)) - len(outputs.failures(found))
        if left:
            raise UserError(
                f'{left} of {len(found)} inputs are still in work in other processes, or were when one died.\n'
                '  For the summary, and for what may be missing, start the same command again.'
            )
        summary = outputs.summarise(found, predictor.classes, threads)
    _show(summary, outputs.root)
    return summary


def _predict_all(predict: Callable, outputs: Outputs, inputs: Inputs, place: Place) -> None:
    """Predict this process's share of the inputs, and then what is left of the others'."""
    named = f'Process {place.rank + 1} of {place.world_size}' if place.world_size > 1 else 'Predicting'
    share = [item for index, item in outputs.not_finished(inputs) if index % place.world_size == place.rank]
    with image_progress(named, len(share), quiet=place.rank > 0) as advance:
        predict(share, advance=advance)
    if place.world_size == 1:
        return
    # What failed would fail again, and a video may be hours into its work.
    failed = outputs.failures(inputs)
    rest = [item for _, item in outputs.not_finished(inputs) if item not in failed and not item.is_video]
    random.Random(place.rank).shuffle(rest)
    with image_progress('Helping the others', len(rest), quiet=place.rank > 0 or not rest) as advance:
        predict((item for item in rest if not outputs.is_finished(item)), advance=advance)


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


def _read_ahead(predictor: Predictor, item: Input) -> Prepared | None:
    """An image, ready for the network; None for what must not be in memory more than once."""
    return None if item.is_video or count_pixels(item.path) > LARGE else predictor.prepare(item.path)


def _predictions(
    predictor: Predictor,
    outputs: Outputs,
    read: Iterable[tuple[Input, Future]],
    batch_size: int,
    advance: Callable[[int, int], None],
) -> Iterator[tuple[Input, Prediction]]:
    """What is predicted for the images that were read; failures, videos and large images are dealt with at once."""
    batch: dict[Input, Prepared] = {}

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


def _show(summary: dict, out_dir: Path) -> None:
    """Print a summary: the largest classes, where the rest is, and what failed as an error."""
    from rich.console import Console
    from rich.table import Table

    table = Table('class', 'share', 'inputs')
    for row in summary['classes'][:SHOWN]:
        table.add_row(row['name'], f'{100 * row["share"]:.1f} %', str(row['inputs']))
    Console().print(table)
    number = len(summary['classes'])
    print(f'{number} classes in {summary["finished"]} of {summary["inputs"]} inputs: {out_dir / "summary.json"}')
    if summary['failed']:
        reasons = list(summary['failed'].values())
        more = f'\n  and {len(reasons) - SHOWN} more, in {out_dir / "summary.json"}' if len(reasons) > SHOWN else ''
        raise UserError(
            f'{len(reasons)} of {summary["inputs"]} inputs could not be predicted; the others were.\n  '
            + '\n  '.join(reasons[:SHOWN])
            + more
        )
