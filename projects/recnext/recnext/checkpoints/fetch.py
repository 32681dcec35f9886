"""Files fetched from an address: continued where they broke off, and in their place only when they are whole.

What pip, pooch and huggingface_hub do between them: a Range request that holds only for the file it began with
(If-Range), attempts that wait longer and longer as long as no new byte comes, and one process at a time.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from filelock import FileLock

from ..utils.errors import UserError
from .files import CheckpointError, read_checkpoint

ARRIVING = '.arriving'
"""Folder beside the destination for what is on its way, and for the locks, which stay: another may wait for one."""

ATTEMPTS = 5
"""How many in a row may bring no new byte."""

TIMEOUT = 30
"""Seconds without a byte after which a connection counts as dead."""

FIRST_WAIT, LONGEST_WAIT = 1, 60
"""Seconds between attempts; each wait is twice the one before, or what the server asks for."""

LARGEST = 4 << 30
"""Bytes; no network of this kind comes near it, and an answer without end would fill the disk."""

BLOCK = 1 << 20
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
NOT_THERE = (404, 410)
PERMANENT = (socket.gaierror, ssl.SSLCertVerificationError, PermissionError, IsADirectoryError)

Show = Callable[[int, int | None], None]


class TransferError(UserError):
    """A file that cannot be fetched. What has arrived of it stays for the next call."""


class NotThereError(TransferError):
    """The server, or the folder, has no such file."""


class _FaultError(Exception):
    """What may be gone at the next attempt."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def fetch(url: str, place: Path, finish: Callable[[Path, Path], object] = os.replace) -> None:
    """Get a file from an http(s):// or file:// address, unless it is there already.

    Args:
        url: The address.
        place: Where the file belongs. What has arrived so far is kept in a hidden folder beside it.
        finish: Makes the file at ``place`` (second argument) of the one that has arrived whole (first argument). If it
            raises a UserError, the file that has arrived is thrown away.

    Raises:
        NotThereError: the address holds no such file.
        TransferError: the file cannot be had for another reason.
        UserError: what ``finish`` says, with the address in the place of the file's.
    """
    if place.is_file():
        return
    arriving = place.parent / ARRIVING / place.name
    try:
        arriving.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{arriving}.lock'):
            # Another process may have fetched it in the meantime.
            if not place.is_file():
                _receive_all(url, arriving)
                try:
                    finish(arriving, place)
                except UserError as error:
                    _discard(arriving)
                    raise type(error)(str(error).replace(str(arriving), url)) from None
                _discard(arriving)
    except OSError as error:
        raise TransferError(f'{place} cannot be written: {error.strerror or error}') from None


def _discard(arriving: Path) -> None:
    for path in (arriving, _note_of(arriving)):
        path.unlink(missing_ok=True)


def _receive_all(url: str, arriving: Path) -> None:
    fruitless, furthest = 0, _size(arriving)
    with _progress(arriving.name) as (show, say):
        while True:
            try:
                return _receive(url, arriving, show)
            except _FaultError as fault:
                size = _size(arriving)
                fruitless, furthest = (0, size) if size > furthest else (fruitless + 1, furthest)
                if fruitless == ATTEMPTS:
                    kept = f'continues after {size} bytes' if _read_note(arriving).get('validator') else 'begins anew'
                    raise TransferError(
                        f'{url} cannot be downloaded: {fault}, {ATTEMPTS} times in a row.\n  The same command {kept}.'
                    ) from None
                wait = min(fault.wait or FIRST_WAIT * 2 ** max(fruitless - 1, 0), LONGEST_WAIT)
                say(f'{fault}; next attempt in {wait:g} s')
            time.sleep(wait)


def _receive(url: str, arriving: Path, show: Show) -> None:
    """Make one request, and add what it brings to what is there."""
    note, start = _read_note(arriving), _size(arriving)
    if note.get('url') != url or not note.get('validator') or start > note['size']:
        start = 0
    elif start == note['size']:
        return
    headers = {'User-Agent': 'recnext', 'Accept-Encoding': 'identity'}
    if start:
        headers |= {'Range': f'bytes={start}-', 'If-Range': note['validator']}
    with _open(url, headers, arriving) as response:
        size, validator = _length(url, response.headers), _validator(response.headers)
        _refuse_larger(url, size or 0, arriving)
        if response.status == http.client.PARTIAL_CONTENT:
            if (_content_range(response.headers), validator) != ((start, note.get('size')), note.get('validator')):
                _discard(arriving)
                raise _FaultError('the server sent another part of the file than the one asked for')
            size = note['size']
        else:
            start = 0
        with arriving.open('r+b' if start else 'wb') as file:
            if not start:  # the file is empty by now: old content never stands beside a new note
                _note_of(arriving).write_text(json.dumps(dict(url=url, validator=size and validator, size=size)))
            file.seek(start)
            show(start, size)
            while block := _read(response):
                _refuse_larger(url, file.tell() + len(block), arriving)
                file.write(block)
                file.flush()
                show(file.tell(), size)
    if size is not None and _size(arriving) != size:
        raise _FaultError(f'the connection ended after {_size(arriving)} of {size} bytes')


def _refuse_larger(url: str, size: int, arriving: Path) -> None:
    if size > LARGEST:
        _discard(arriving)
        raise TransferError(f'{url} is refused: more than {LARGEST / 2**30:g} GiB, which no checkpoint here needs.')


def _open(url: str, headers: dict[str, str], arriving: Path) -> BinaryIO:
    try:
        return urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        reason = f'{error.code} {str(error.reason).splitlines()[0]}' if error.reason else str(error.code)
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            _discard(arriving)
            raise _FaultError('the file on the server is shorter than what has arrived') from None
        if error.code in TRANSIENT:
            wait = error.headers.get('Retry-After', '')
            raise _FaultError(f'the server answers {reason}', float(wait) if wait.isdecimal() else None) from None
        if error.code in NOT_THERE:
            raise NotThereError(f'{url} cannot be downloaded: the server answers {reason}') from None
        raise TransferError(f'{url} cannot be downloaded: the server answers {reason}') from None
    except (ValueError, http.client.InvalidURL) as error:
        raise TransferError(f'{url} cannot be downloaded: {error}') from None
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, FileNotFoundError):
            raise NotThereError(f'{url} cannot be downloaded: there is no such file') from None
        if isinstance(reason, PERMANENT) or isinstance(reason, str):
            raise TransferError(f'{url} cannot be downloaded: {_described(reason)}') from None
        raise _FaultError(_described(reason)) from None


def _read(response: BinaryIO) -> bytes:
    try:
        return response.read1(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _FaultError(_described(error)) from None


def _described(error: Exception | str) -> str:
    if isinstance(error, TimeoutError):
        return f'no byte came for {TIMEOUT} s'
    return getattr(error, 'strerror', None) or str(error) or type(error).__name__


def _length(url: str, headers: Message) -> int | None:
    """How many bytes the answer has; None if it comes in chunks, whose end is marked."""
    if headers.get_content_type() == 'text/html':
        raise TransferError(
            f'{url} cannot be downloaded: found a web page where a file was expected, such as the login page of a '
            'network. Open the address in a browser.'
        )
    if 'chunked' in headers.get('Transfer-Encoding', ''):
        return None
    if not headers.get('Content-Length', '').isdecimal():
        raise TransferError(
            f'{url} cannot be downloaded: the server does not say how long the file is (Content-Length), so a part '
            'of it would look like the whole.'
        )
    return int(headers['Content-Length'])


def _validator(headers: Message) -> str | None:
    """What tells this version of a file from others (RFC 9110, 13.1.5); weak ETags do not."""
    etag = headers.get('ETag')
    return etag if etag and not etag.startswith('W/') else headers.get('Last-Modified')


def _content_range(headers: Message) -> tuple[int, int] | None:
    """Where the part begins, and the size of the whole file."""
    match = re.fullmatch(r'bytes (\d+)-\d+/(\d+)', headers.get('Content-Range', ''))
    return (int(match[1]), int(match[2])) if match else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _note_of(arriving: Path) -> Path:
    """Where it is noted what is arriving: address, size, and validator."""
    return arriving.with_name(f'{arriving.name}.json')


def _read_note(arriving: Path) -> dict:
    try:
        return json.loads(_note_of(arriving).read_text())
    except (FileNotFoundError, ValueError):
        return {}


@contextlib.contextmanager
def _progress(name: str) -> Iterator[tuple[Show, Callable[[str], None]]]:
    """A bar on stderr: functions to move it and to say something above it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn('{task.description}'), *columns, console=Console(stderr=True))
    task = bar.add_task(name, total=None)

    def show(done: int, size: int | None) -> None:
        if not bar.live.is_started:  # only now: without an answer there is nothing to draw
            say(f'{size / 1e6:.1f} MB' if size else 'of unknown size')
            bar.start()
        bar.update(task, completed=done, total=size)

    def say(words: str) -> None:
        bar.console.print(f'{name}: {words}', markup=False, highlight=False, soft_wrap=True)

    try:
        yield show, say
    finally:
        bar.stop()


def fetch_checkpoint(url: str) -> Path:
    """The checkpoint at an address, in torch.hub's cache; one process fetches it if it is not there yet.

    Each address has a folder of its own there: files of one name from two places are two files.

    Raises:
        UserError: it cannot be had, or is no checkpoint.
    """
    name = PurePosixPath(urlparse(url).path).name
    if name in ('', '..'):
        raise CheckpointError(f'{url} names no file; expected the address of a checkpoint.')
    place = Path(torch.hub.get_dir(), 'checkpoints', hashlib.sha256(url.encode()).hexdigest()[:16], name)
    fetch(url, place, _place_readable)
    return place


def _place_readable(arrived: Path, place: Path) -> None:
    read_checkpoint(arrived)
    os.replace(arrived, place)
