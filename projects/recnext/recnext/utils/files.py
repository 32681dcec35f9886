"""Files and folders that are written whole or not at all."""

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

PARTIAL = '.partial-'
"""How the folders begin in which something is being written."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

LEAST_FREE = 2**16
"""Bytes: with fewer left, a writer that failed without saying why had no room."""


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
def atomic_write(path: str | Path, staging: Path | None = None) -> Iterator[Path]:
    """Where to write a file or a folder that takes the place of ``path`` when the block ends.

    It is then there in full, through to the disk; after an error what was there before stays, and nothing else. A file
    that is replaced passes its mode on. Of several processes that write at once, the last one's stays.

    Args:
        path: Of the file or folder; a folder must not be there yet.
        staging: An existing folder on the same file system to write in first; that of ``path`` if None.

    Raises:
        UserError: there is no permission, the disk is full, or the system has another reason against that file. Other
            errors of the block are passed on.
    """
    path = Path(path)
    make_folder(path.parent)
    # Not the number of the process: in a container it is the same every time.
    place = (staging or path.parent) / f'{PARTIAL}{secrets.token_hex(8)}'
    try:
        place.mkdir()
    except OSError as error:
        raise UserError(f'{path} cannot be written: {_reason(error)}') from None
    try:
        beside = place / path.name
        try:
            yield beside
            _sync(beside)
        except Exception as error:
            reason = _why_not_written(error, place)
            if reason is None:
                raise
            raise UserError(f'{path} cannot be written: {reason}. What was there before stays.') from error
        try:
            if path.is_file():
                beside.chmod(stat.S_IMODE(path.stat().st_mode))
            os.replace(beside, path)
        except OSError as error:
            raise UserError(f'{path} cannot be written: {_reason(error)}') from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _sync(path: Path) -> None:
    """Bring a file, or all files in a folder, through to the disk."""
    for file in path.rglob('*') if path.is_dir() else (path,):
        if file.is_file():
            with file.open('r+b') as opened:
                os.fsync(opened.fileno())


def _reason(error: OSError) -> str | None:
    return 'the disk is full' if error.errno in DISK_FULL else error.strerror


def _why_not_written(error: Exception, place: Path) -> str | None:
    """What kept a file in ``place`` from being written; None if the error is about something else."""
    if isinstance(error, UserError):
        return None
    if isinstance(error, OSError) and error.errno not in DISK_FULL and _concerns(error, place):
        return error.strerror
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            # Without a name it came of an open file. Another disk may be full, such as that of temporary files.
            return 'the disk is full' if cause.filename is None or _concerns(cause, place) else None
        # safetensors and shutil.copytree have it in words only.
        if any(os.strerror(code) in str(cause) for code in DISK_FULL):
            return 'the disk is full'
        cause = cause.__cause__ or cause.__context__
    # torch and OpenCV, writing by name, do not say it at all.
    with contextlib.suppress(OSError):
        if isinstance(error, RuntimeError) and shutil.disk_usage(place).free < LEAST_FREE:
            return 'the disk is full'
    return None


def _concerns(error: OSError, folder: Path) -> bool:
    """Whether the error names a file in a folder."""
    names = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, (str, os.PathLike))]
    folders = {folder.absolute(), folder.resolve()}
    return any(not folders.isdisjoint(name.absolute().parents) for name in names)


def remove_partial_files(folder: str | Path) -> None:
    """Remove what :func:`atomic_write` left in a folder when it was killed; no other process may write there."""
    for path in Path(folder).glob(f'{PARTIAL}*'):
        shutil.rmtree(path, ignore_errors=True)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
