"""Folders and files that are written whole or not at all."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


def make_folder(path: str | Path) -> None:
    """Make a folder to write in.

    Raises:
        UserError: it cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{path} cannot be made a folder to write in: {error.strerror}') from None


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Where to write a file or a folder that takes the place of ``path`` in the end; after an error nothing stays.

    Raises:
        UserError: there is something at ``path``, or it cannot be written.
    """
    make_folder(path.parent)
    try:
        with tempfile.TemporaryDirectory(prefix=f'.{path.name}-', dir=path.parent) as folder:
            beside = Path(folder) / path.name
            yield beside
            beside.rename(path)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error}') from None
