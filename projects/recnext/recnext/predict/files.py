"""Prediction for collections of any size: shared out among processes, and continued where it was interrupted.

Of several processes each predicts every n-th input, and skips what is finished. None waits for another: the last one to
finish adds all up.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ..utils.errors import UserError, printable
from ..utils.images import ImageError, pixels_in_header, silence_opencv
from ..utils.parallel import completed
from ..utils.progress import image_progress
from .inputs import Input, Inputs
from .model import Model, PreparedImage
from .outputs import Outputs
from .prediction import Prediction

MAX_PREFETCH_PIXELS = 2**24
"""Above it an image is neither read ahead nor written behind: one of these is in memory at a time."""

MIN_THREADS, MAX_THREADS = 2, 8
"""That read; as many write."""

MAX_LISTED = 10
"""Classes and failures that are printed. The summary has all."""


def predict_files(
    model: Model,
    inputs: Inputs,
    out_dir: str | Path,
    overlay: bool = True,
    batch_size: int = 1,
    share: tuple[int, int] = (0, 1),
) -> dict | None:
    """Predict files, skip what is finished, and print a summary.

    Args:
        model: See :func:`.model.load`.
        inputs: See :func:`.inputs.find_inputs`.
        out_dir: Folder of the outputs; see :mod:`.outputs`.
        overlay: Whether to draw overlays.
        batch_size: Images in a batch; those of one size go through the network together.
        share: (i, n): predict every n-th input, from the i-th on, counted from 0.

    Returns:
        The summary, see :func:`.outputs.add_up`; None where other processes have inputs left.

    Raises:
        UserError: the folder cannot be written or has outputs of other settings; or, in the end, inputs could not be
            predicted.
    """
    silence_opencv()
    index, processes = share
    outputs = Outputs(out_dir, overlay, index)
    threads = min(max(torch.get_num_threads(), MIN_THREADS), MAX_THREADS)
    outputs.open({**model.provenance, 'overlay': overlay, 'root': str(inputs.root)})
    mine = [item for place, item in outputs.not_finished(inputs) if place % processes == index]
    outputs.forget_failures(mine)
    title = f'Process {index + 1} of {processes}' if processes > 1 else 'Predicting'
    with image_progress(title, len(mine), quiet=index > 0) as advance:
        predict_items(model, outputs, mine, batch_size, threads, advance)
    unfinished = [item for _, item in outputs.not_finished(inputs)]
    if left := len(unfinished) - len(outputs.failures(unfinished)):
        outputs.close()
        print(
            f'{left} of {len(inputs)} inputs are left to other processes; the last one to finish writes the summary.\n'
            '  If one has died, start the same command again.'
        )
        return None
    summary = outputs.summarise(inputs, model.classes, threads)
    outputs.close()
    show_summary(summary, outputs.root, overlay)
    return summary


def predict_items(
    model: Model,
    outputs: Outputs,
    items: Iterable[Input],
    batch_size: int,
    threads: int,
    advance: Callable[[int, int], None],
) -> None:
    """Predict inputs: threads read ahead, this one predicts, threads write behind, with few images in memory.

    Args:
        model: The model.
        outputs: Where to write; :mod:`.ray` has others.
        items: What to predict, each where its ``source`` says.
        batch_size: Images in a batch.
        threads: That read; as many write.
        advance: Called with the numbers of inputs and frames that are done.
    """
    with ThreadPoolExecutor(threads) as readers, ThreadPoolExecutor(threads) as writers:
        read = completed(readers, functools.partial(_read_ahead, model), items, 2 * threads)
        predicted = _predictions(model, outputs, read, batch_size, advance)
        for _, written in completed(writers, lambda pair: outputs.save(*pair), predicted, 2 * threads):
            written.result()
            advance(1, 1)


def _read_ahead(model: Model, item: Input) -> PreparedImage | None:
    """An image, ready for the network; None for what must not be in memory more than once."""
    large = item.is_video or pixels_in_header(item.source) > MAX_PREFETCH_PIXELS
    return None if large else model.prepare(item.source, str(item.path))


def _predictions(
    model: Model,
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
            yield from zip(batch, model.predict(list(batch.values())))
        except ImageError as error:
            for item in batch:
                fail(item, error)
        batch.clear()

    for item, reading in read:
        try:
            prepared = reading.result()
            if item.is_video:
                outputs.save_video(item, model, on_frame=lambda: advance(0, 1))
                advance(1, 0)
            elif prepared is None:
                outputs.save(item, *model.predict([model.prepare(item.source, str(item.path))]))
                advance(1, 1)
            else:
                batch[item] = prepared
        except ImageError as error:
            fail(item, error)
        if len(batch) == batch_size:
            yield from predict_batch()
    if batch:
        yield from predict_batch()


def show_summary(summary: dict, out_dir: str | Path, overlay: bool, shards: bool = False) -> None:
    """Print a summary: the largest classes, where the outputs are, and what failed as an error.

    Raises:
        UserError: inputs that could not be predicted.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    failed = list(summary['failed'].values())
    if summary['classes']:
        table = Table('class', 'share', 'inputs')
        for row in summary['classes'][:MAX_LISTED]:
            table.add_row(escape(printable(row['name'])), f'{100 * row["share"]:.1f} %', str(row['inputs']))
        Console().print(table)
        where = f'Label maps in {out_dir}/labels' + (f', overlays in {out_dir}/overlays' if overlay else '')
        where = f'Shards in {out_dir}/shards' if shards else where
        print(f'{len(summary["classes"])} classes in {summary["finished"]} of {summary["inputs"]} inputs. {where}.')
    if failed:
        more = f'\n  and {len(failed) - MAX_LISTED} more, in {out_dir}/summary.json' if len(failed) > MAX_LISTED else ''
        raise UserError(
            f'{len(failed)} of {summary["inputs"]} inputs could not be predicted:\n  '
            + '\n  '.join(failed[:MAX_LISTED])
            + more
        )
