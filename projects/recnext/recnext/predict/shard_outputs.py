"""Outputs as shards: label maps, areas and overlays of many inputs in one Parquet or tar file.

- ``shards/``: what was predicted. Columns of Parquet, or files of WebDataset by their endings: ``labels.png``,
  ``overlay.jpg``, ``areas.json``.
- ``areas/``: a JSON for each shard, with the areas of all inputs in it, written last. Where it is, they are finished.
- ``run.json``, ``summary.json``: as in :mod:`batch_outputs`.

A shard is called by what is in it: made again, it takes its own place.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.errors import UserError, first_line
from ..utils.files import atomic_write
from .address_inputs import SCHEME
from .batch_outputs import add_up, check_made_with

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

FORMATS = ('parquet', 'webdataset')

SUFFIXES = dict(parquet='.parquet', webdataset='.tar')


class ShardOutputs:
    """A folder, or an address of what fsspec knows.

    Args:
        root: Made if it is missing.
        kind: One of :data:`FORMATS`.
    """

    def __init__(self, root: str | Path, kind: str) -> None:
        self.root = str(root).rstrip('/')
        self.kind = kind
        self.finished: frozenset[str] = frozenset()
        """Keys of what was there when it was opened."""

    def open(self, made_with: dict) -> None:
        """Read what is finished, and remove what a run that was killed left.

        Raises:
            UserError: there are outputs that were made with anything else, or the address cannot be used.
        """
        from fsspec.core import url_to_fs

        try:
            files, root = url_to_fs(self.root)
            files.invalidate_cache()
            run = f'{root}/run.json'
            if files.exists(run):
                check_made_with(self.root, json.loads(files.cat_file(run)), made_with)
            else:
                self.put('run.json', json.dumps(made_with, indent=1).encode())
            reports = {Path(path).stem for path in _list(files, f'{root}/areas')}
            for path in _list(files, f'{root}/shards'):
                if Path(path).stem not in reports:
                    files.rm_file(path)
            self.finished = frozenset(row['key'] for row in self._reports())
        except ImportError as error:
            raise UserError(f'{self.root} takes a package that is not installed: {error}') from None
        except (OSError, ValueError) as error:
            raise UserError(f'{self.root} cannot be used: {first_line(error) or type(error).__name__}') from None

    def save(self, rows: Sequence[dict]) -> None:
        """Write a shard.

        Args:
            rows: ``key``, ``labels`` and ``overlay`` (bytes, or None), and ``report``, in JSON.
        """
        name = hashlib.sha256('\0'.join(row['key'] for row in rows).encode()).hexdigest()[:32]
        encode = dict(parquet=_as_parquet, webdataset=_as_tar)[self.kind]
        self.put(f'shards/{name}{SUFFIXES[self.kind]}', encode(rows))
        reports = [dict(key=row['key'], **json.loads(row['report'])) for row in rows]
        self.put(f'areas/{name}.json', json.dumps(reports, indent=1).encode())

    def put(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all: an object store does so by itself."""
        if SCHEME in self.root:
            import fsspec

            with fsspec.open(f'{self.root}/{name}', 'wb') as file:
                file.write(content)
        else:
            with atomic_write(Path(self.root, name)) as beside:
                beside.write_bytes(content)

    def summarise(self, inputs: int, failed: dict[str, str], classes: Sequence[str]) -> dict:
        """Add up all that is finished in ``summary.json``; see :func:`batch_outputs.add_up`."""
        summary = add_up(inputs, (row['areas'] for row in self._reports()), failed, classes)
        self.put('summary.json', json.dumps(summary, indent=1).encode())
        return summary

    def _reports(self) -> Iterator[dict]:
        """One of each input that is finished."""
        from fsspec.core import url_to_fs

        files, root = url_to_fs(self.root)
        files.invalidate_cache()
        for path in _list(files, f'{root}/areas'):
            yield from json.loads(files.cat_file(path))


def _list(files: 'AbstractFileSystem', folder: str) -> list[str]:
    return files.find(folder) if files.exists(folder) else []


def _as_parquet(rows: Sequence[dict]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    columns = dict(key=pyarrow.string(), labels=pyarrow.binary(), overlay=pyarrow.binary(), report=pyarrow.string())
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), pyarrow.schema(columns)), file)
    return file.getvalue()


def _as_tar(rows: Sequence[dict]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as tar:
        for row in rows:
            # WebDataset takes what follows the first dot of a file's name for its ending.
            folder, _, stem = row['key'].rpartition('/')
            key = f'{folder}/' * bool(folder) + stem.replace('%', '%25').replace('.', '%2E')
            parts = {'labels.png': row['labels'], 'overlay.jpg': row['overlay'], 'areas.json': row['report'].encode()}
            for ending, content in parts.items():
                if content is not None:
                    member = tarfile.TarInfo(f'{key}.{ending}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return file.getvalue()
