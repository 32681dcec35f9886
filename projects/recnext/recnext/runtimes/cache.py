"""Converted networks on disk: whole, checked when they are read, made by one process at a time, and not for ever."""

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from ..utils.errors import UserError
from ..utils.files import atomic_write, sha256_of

logger = logging.getLogger(__name__)

RECORD = 'entry.json'
"""The file of an entry that says what it was made of, and has the SHA-256 of the others."""

MOST_BYTES = 8 << 30
"""Of all entries together. Those that were not used for the longest time make way for a new one."""


class Entry:
    """The place of one converted network: a folder with its files and a record of them.

    The cache is never trusted. An entry counts if its record is that of exactly this network, and every file in it has
    the bytes that were written. Anything else is as good as nothing, and is made anew.

    Args:
        folder: Of the entry.
        made_of: What decides the content, in full: see :func:`.identity.identify`.
    """

    def __init__(self, folder: Path, made_of: dict[str, str]) -> None:
        self.folder = folder
        self.made_of = made_of

    def is_whole(self) -> bool:
        """Whether it is there, of this network, and as it was written."""
        try:
            record = json.loads((self.folder / RECORD).read_text())
            files = record['files']
            return (
                record['made_of'] == self.made_of
                and bool(files)
                and all(sha256_of(self.folder / name) == digest for name, digest in files.items())
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def note_use(self) -> None:
        """It is in use, and will be among the last that make way."""
        with contextlib.suppress(OSError):  # a cache that is shared and cannot be written
            os.utime(self.folder / RECORD)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from making the same entry; where nothing can be written there is nothing to keep."""
        with contextlib.ExitStack() as stack:
            # NotImplementedError: a file system without locks. OSError: one that is read-only, or no folder at all.
            with contextlib.suppress(OSError, NotImplementedError):
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(self.folder.with_suffix('.lock')))
            yield

    def keep(self, files: Path) -> bool:
        """Copy the files of a folder into the entry; whether it could be done. If not, that is said in the log."""
        digests = {path.name: sha256_of(path) for path in sorted(files.iterdir())}
        record = json.dumps(dict(made_of=self.made_of, files=digests), indent=2)
        try:
            with atomic_write(self.folder) as beside:
                shutil.copytree(files, beside)
                (beside / RECORD).write_text(record)
                self._make_way()
        except UserError as error:
            logger.info(f'The converted network is not kept, and is made again next time: {error}')
            return False
        self._make_room()
        return True

    def _make_room(self) -> None:
        """Remove what was not used for the longest time until the rest takes no more than :data:`MOST_BYTES`.

        Who has a network open keeps it: its files are gone from the folder, not from under the one who reads them.
        """
        left = MOST_BYTES
        with contextlib.suppress(OSError):  # another process removes as well
            records = sorted(self.folder.parent.glob(f'*/{RECORD}'), key=lambda path: path.stat().st_mtime)
            for record in reversed(records):
                left -= sum(path.stat().st_size for path in record.parent.iterdir())
                if left < 0 and record.parent != self.folder:
                    logger.info(f'{record.parent} makes way for newer networks.')
                    Entry(record.parent, {})._make_way()

    def _make_way(self) -> None:
        """Remove what is there: a folder is not replaced in one step."""
        if self.folder.is_dir() and not self.folder.is_symlink():
            shutil.rmtree(self.folder)
        else:
            self.folder.unlink(missing_ok=True)
