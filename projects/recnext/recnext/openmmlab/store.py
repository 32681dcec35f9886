"""Where checkpoints and logs are kept beside the work dir: ``s3://``, ``gs://``, a folder and the like, by fsspec."""

import contextlib
import posixpath
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..checkpoints.files import NUMBERED, CheckpointError, read_newest_checkpoint
from ..utils.errors import PassingError, UserError, first_line
from ..utils.files import PARTIAL, atomic_write, make_folder

OBJECT_STORES = {'s3', 's3a', 'gs', 'gcs', 'abfs', 'abfss', 'az', 'adl', 'oss', 'oci', 'hf'}
"""Protocols that show a file when it is whole, by themselves."""

TRIES, FIRST_PAUSE = 4, 1.0
"""How often the network is tried, and seconds before the second time; twice as many before each further one."""

LASTING = (PermissionError, FileNotFoundError, NotADirectoryError, UserError)
"""Errors that will not be gone after a pause."""

Result = TypeVar('Result')


class Store:
    """A folder of files somewhere.

    Args:
        url: As fsspec has it.

    Raises:
        UserError: what kind of place this is is not known, or a package for it is missing.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            from fsspec.core import url_to_fs

            self._fs, self._root = url_to_fs(url)
        except ImportError as error:
            raise UserError(f'--store {url} needs a package: {first_line(error)}') from None
        except ValueError as error:
            raise UserError(f'--store {url} is not understood: {first_line(error)}') from None
        protocols = [self._fs.protocol] if isinstance(self._fs.protocol, str) else self._fs.protocol
        self._shows_whole_files = not OBJECT_STORES.isdisjoint(protocols)

    def list_names(self) -> set[str]:
        """The files directly in the store; none where it is yet to be made."""

        def list_now() -> set[str]:
            self._fs.invalidate_cache()
            try:
                return {posixpath.basename(path) for path in self._fs.ls(self._root, detail=False)}
            except FileNotFoundError:
                return set()

        return self._patiently('read', list_now)

    def put(self, path: Path, name: str) -> None:
        """Write a file of this machine, in the place of what has this name; a reader sees one or the other, whole.

        Raises:
            UserError: it cannot be, with the reason.
        """
        self._patiently('written', lambda: self._put(path, self._path(name)))

    def _put(self, path: Path, place: str) -> None:
        if self._shows_whole_files:
            self._fs.put_file(str(path), place)
            return
        folder, name = posixpath.split(place)
        beside = posixpath.join(folder, f'{PARTIAL}{secrets.token_hex(8)}-{name}')
        self._fs.makedirs(folder, exist_ok=True)
        try:
            self._fs.put_file(str(path), beside)
            self._fs.mv(beside, place)
        except BaseException:
            with contextlib.suppress(Exception):
                self._fs.rm_file(beside)
            raise

    def get(self, name: str, path: Path) -> None:
        """Fetch a file, whole or not at all.

        Raises:
            UserError: it cannot be, with the reason.
        """

        def get_now() -> None:
            with atomic_write(path) as beside:
                self._fs.get_file(self._path(name), str(beside))

        self._patiently('read', get_now)

    def remove(self, name: str) -> None:
        """Remove a file, which need not be there.

        Raises:
            UserError: it cannot be, with the reason.
        """

        def remove_now() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(name))

        self._patiently('written', remove_now)

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def _patiently(self, what: str, work: Callable[[], Result]) -> Result:
        for trial in range(TRIES):
            if trial:
                time.sleep(FIRST_PAUSE * 2 ** (trial - 1))
            try:
                return work()
            except UserError:
                raise
            except Exception as error:  # each kind of store has its own
                said = f'{self.url} cannot be {what}: {type(error).__name__}: {first_line(error)}'
                if isinstance(error, LASTING):
                    raise UserError(f'{said}. See that it is there, and who may write to it.') from error
                failed = PassingError(f'{said} ({TRIES} times)')
        raise failed


def share_newest_checkpoint(store: Store, folder: str) -> None:
    """Give a work dir and a store the same newest checkpoint: that of the one goes to the other.

    So processes on machines without a common work dir go on from the same. Of several processes of one machine one
    does it, and the others wait.

    Raises:
        UserError: it cannot be copied.
    """
    from filelock import FileLock

    make_folder(folder)
    with FileLock(Path(folder, '.store.lock')):
        there = {int(match[1]): name for name in store.list_names() if (match := NUMBERED.fullmatch(name))}
        newest, here = max(there, default=-1), _newest_whole(folder)
        number = -1 if here is None else int(NUMBERED.fullmatch(here.name)[1])
        if newest > number:
            store.get(there[newest], Path(folder, there[newest]))
        elif here is not None and number > newest:
            store.put(here, here.name)


def _newest_whole(folder: str) -> Path | None:
    try:
        newest = read_newest_checkpoint(folder)
    except CheckpointError:  # the store may have one
        return None
    return newest and newest.path
