"""Work in threads, a bounded number of items ahead of whoever takes the results."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import TypeVar

Item, Result = TypeVar('Item'), TypeVar('Result')


def completed(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], most: int
) -> Iterator[tuple[Item, 'Future[Result]']]:
    """Do ``work`` for every item, in the order in which it gets done.

    Args:
        pool: Of threads.
        work: What to do with an item.
        items: Taken only when there is room for them.
        most: Items in work, or done and not taken yet.
    """
    pending: dict[Future[Result], Item] = {}
    for item in items:
        pending[pool.submit(work, item)] = item
        while len(pending) >= most:
            yield from _take(pending)
    while pending:
        yield from _take(pending)


def _take(pending: dict['Future[Result]', Item]) -> Iterator[tuple[Item, 'Future[Result]']]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future
