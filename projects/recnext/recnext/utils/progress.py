"""How far a long work is: a bar where somebody looks on, a line now and then in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOG_SECONDS = 30


@contextmanager
def image_progress(title: str, total: int, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show how many of ``total`` inputs are done, the images per second and the time left.

    Yields:
        To be called with how many inputs were finished since the last call, and how many images.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ('{task.description}', BarColumn(), MofNCompleteColumn(), '{task.fields[rate]}', TimeRemainingColumn())
    columns = [TextColumn(column) if isinstance(column, str) else column for column in columns]
    console = Console()
    began = logged = time.monotonic()
    images = 0

    def advance(inputs: int, new_images: int) -> None:
        nonlocal images, logged
        images += new_images
        now = time.monotonic()
        rate = f'{images / max(now - began, 1e-6):.1f} images/s'
        bar.update(task, advance=inputs, rate=rate)
        if not quiet and not console.is_terminal and now - logged > LOG_SECONDS:
            logged = now
            print(f'{title}: {bar.tasks[0].completed:.0f}/{total}, {rate}', flush=True)

    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task(title, total=total, rate='')
        yield advance
