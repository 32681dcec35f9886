"""Files fetched from an address by pooch; a file gets its name only when it has arrived whole."""

import contextlib
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import torch
from filelock import FileLock

from ..utils.errors import UserError, first_line, printable
from ..utils.files import atomic_write, make_folder, remove_partial_files
from .files import CheckpointError, read_checkpoint

if TYPE_CHECKING:
    from requests import Response

ARRIVING = '.arriving'
"""Folder beside the destination for locks, which stay, and for files on their way."""

RETRIES = 2
TIMEOUT = 30
"""Seconds without a byte after which a connection counts as dead."""

BLOCK = 1 << 16
LONGEST_REASON = 200
NOT_THERE = (404, 410)
TRANSIENT = (408, 425, 429)
"""Client errors that may be gone at the next attempt, as those of a server (5xx) may."""


class TransferError(UserError):
    """A file that cannot be fetched."""


class NotThereError(TransferError):
    """The server, or the folder, has no such file."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Lock a file for one process at a time, and yield a folder on its file system for what is to become it.

    Raises:
        UserError: nothing can be written there.
    """
    staging = path.parent / ARRIVING / path.name
    make_folder(staging)
    lock = FileLock(staging / 'lock')
    try:
        lock.acquire()
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror or error}') from None
    try:
        remove_partial_files(staging)  # of a process that was killed
        yield staging
    finally:
        lock.release()


def fetch(url: str, path: Path) -> None:
    """Download the file at an http(s) address, with a progress bar; again from its beginning if it is cut.

    Args:
        url: The address.
        path: New file to write, which is not there yet; its folder is.

    Raises:
        NotThereError: the address holds no such file.
        TransferError: the file cannot be had for another reason, or is a web page.
    """
    import pooch
    from requests import RequestException

    if urlparse(url).scheme not in ('http', 'https'):
        raise TransferError(f'{url} cannot be downloaded: expected an address that begins with https:// or http://.')
    downloader = pooch.HTTPDownloader(
        progressbar=True, chunk_size=BLOCK, timeout=TIMEOUT, hooks=dict(response=partial(_refuse_for_good, url))
    )
    registry, urls = {path.name: None}, {path.name: url}
    cache = pooch.create(path=path.parent, base_url='', registry=registry, urls=urls, retry_if_failed=RETRIES)
    try:
        cache.fetch(path.name, downloader=downloader)
    except (RequestException, ValueError) as error:
        raise TransferError(f'{url} cannot be downloaded: {_reason(error)}') from None


def _refuse_for_good(url: str, response: 'Response', **_: object) -> None:
    """Raise an error for an answer that would be no other at the next attempt."""
    code = response.status_code
    said = f'{url} cannot be downloaded: the server answers {code} {response.reason}'
    if code in NOT_THERE:
        raise NotThereError(said)
    if 400 <= code < 500 and code not in TRANSIENT:
        raise TransferError(said)
    if code == 200 and response.headers.get('Content-Type', '').startswith('text/html'):
        raise TransferError(
            f'{url} cannot be downloaded: found a web page where a file was expected, such as the login page '
            'of a network. Open the address in a browser.'
        )


def _reason(error: Exception) -> str:
    """Return what an error of requests says; of a failed connection its cause, which it repeats in many words."""
    from requests import ConnectionError

    cause: BaseException = error
    while isinstance(error, ConnectionError) and cause.__context__ is not None:
        cause = cause.__context__
    return printable(first_line(cause) or type(cause).__name__, LONGEST_REASON)


@contextlib.contextmanager
def called(path: Path, url: str) -> Iterator[None]:
    """Name the address in errors of this block, instead of the file that it was fetched to."""
    try:
        yield
    except UserError as error:
        raise type(error)(str(error).replace(str(path), url)) from None


def fetch_checkpoint(url: str) -> Path:
    """Fetch the checkpoint at an address into torch.hub's cache, once, by one process.

    Each address has a folder of its own there: files of one name from two places are two files.

    Raises:
        UserError: it cannot be had, or is no checkpoint.
    """
    name = PurePosixPath(urlparse(url).path).name
    if name in ('', '..'):
        raise CheckpointError(f'{url} names no file; expected the address of a checkpoint.')
    path = Path(torch.hub.get_dir(), 'checkpoints', hashlib.sha256(url.encode()).hexdigest()[:16], name)
    if not path.is_file():
        with locked(path) as staging:
            if not path.is_file():  # another process may have fetched it in the meantime
                with atomic_write(path, staging) as arrived, called(arrived, url):
                    fetch(url, arrived)
                    read_checkpoint(arrived)
    return path
