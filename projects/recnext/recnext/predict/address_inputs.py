"""Inputs that any machine can read: files, addresses such as ``s3://...``, and the images in tar and Parquet shards."""

import io
import itertools
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..utils.errors import UserError, first_line
from ..utils.images import IMAGE_SUFFIXES
from .batch_inputs import Input, Inputs, find_inputs

SCHEME = '://'

SHARDS = ('.tar', '.parquet')
"""How files end that hold many images."""

KEY_COLUMNS = ('key', '__key__', 'name', 'path', 'id')
"""Of Parquet: the first that is there names the images."""

TAR_END = bytes(1024)

ROWS_AT_ONCE = 64
"""Of Parquet, in memory."""


class Content(NamedTuple):
    """The bytes of one image, or why there are none."""

    name: str
    key: str
    """What its outputs are called; see :class:`batch_inputs.Input`."""
    address: str
    """What messages call it."""
    content: bytes | None
    error: str | None


class AddressInputs(NamedTuple):
    """Inputs, and where they are."""

    found: Inputs
    scheme: str
    """Such as ``s3://``; nothing for files."""

    @property
    def root(self) -> str:
        """The innermost folder that all inputs are in."""
        return self.scheme + str(self.found.root)

    @property
    def in_shards(self) -> bool:
        """Whether they hold many images each."""
        return any(_is_shard(item.name) for item in self.found)


def find_addresses(arguments: Sequence[str | Path], out_dir: str | Path) -> AddressInputs:
    """Find what the arguments name.

    Args:
        arguments: As for :func:`batch_inputs.find_inputs`, or all of them addresses of what fsspec knows, with
            patterns; an address of a folder stands for the images in it. A name that ends with ``.tar`` or
            ``.parquet`` is a shard.
        out_dir: Left out, where it is inside one of the folders.

    Raises:
        UserError: nothing is there; addresses of several kinds, images beside shards, or videos.
    """
    schemes = {argument.partition(SCHEME)[0] + SCHEME if SCHEME in argument else '' for argument in map(str, arguments)}
    if len(schemes) > 1:
        raise UserError(f'Inputs of one kind at a time; found {", ".join(sorted(s or "files" for s in schemes))}.')
    (scheme,) = schemes
    found = _list_addresses(list(map(str, arguments)), scheme) if scheme else find_inputs(arguments, out_dir)
    shards = sum(_is_shard(item.name) for item in found)
    if shards not in (0, len(found)):
        raise UserError(
            f'{shards} of {len(found)} inputs are shards: predict them, and the images, one after the other.'
        )
    videos = [item.name for item in found if item.is_video]
    if videos:
        raise UserError(f'{videos[0]} is a video, {len(videos)} in all. Predict videos without --ray.')
    return AddressInputs(found, scheme)


def _is_shard(name: str) -> bool:
    return name.lower().endswith(SHARDS)


def _list_addresses(arguments: list[str], scheme: str) -> Inputs:
    from fsspec.core import url_to_fs

    roots, folders = [], defaultdict(set)
    for argument in arguments:
        try:
            files, path = url_to_fs(argument)
            if '*' in path or '?' in path:
                roots.append(path[: min(path.find(c) for c in '*?' if c in path)].rpartition('/')[0])
                places = files.glob(path)
            elif files.isfile(path):
                roots.append(path.rpartition('/')[0])
                places = [path]
            else:
                roots.append(path.rstrip('/'))
                places = [place for place in files.find(path) if PurePosixPath(place).suffix.lower() in IMAGE_SUFFIXES]
        except ImportError as error:
            raise UserError(f'{argument} takes a package that is not installed: {error}') from None
        except (OSError, ValueError) as error:
            raise UserError(f'{argument} cannot be listed: {first_line(error) or type(error).__name__}') from None
        if not places:
            raise UserError(
                f'{argument} holds no images. Expected files that end in {", ".join(sorted(IMAGE_SUFFIXES))}.'
            )
        for place in places:
            folder, _, name = place.rpartition('/')
            folders[folder].add(name)
    root = os.path.commonpath(roots)
    return Inputs(Path(root), {os.path.relpath(folder, root): names for folder, names in folders.items()})


def read_row(root: str, is_finished: Callable[[str], bool] | None, row: dict) -> Iterator[dict]:
    """:func:`read_contents` for a row of names; readers on a cluster import no more than this file."""
    item = Input(Path(row['name']), row['name'], row['key'])
    return (content._asdict() for content in read_contents(f'{root}/{item.name}', item, is_finished))


def read_contents(address: str, item: Input, is_finished: Callable[[str], bool] | None = None) -> Iterator[Content]:
    """Read one input: the image, or all the images in a shard.

    What cannot be read is said in its place; images that are finished come without their bytes.

    Args:
        address: Of the input.
        item: Its names.
        is_finished: Whether the outputs of a key are there; asked of what is in shards.
    """
    import fsspec

    suffix = PurePosixPath(item.name).suffix.lower()
    try:
        with fsspec.open(address, 'rb') if SCHEME in address else open(address, 'rb') as file:
            if suffix not in SHARDS:
                yield Content(item.name, item.key, address, file.read(), None)
                return
            used: set[str] = set()
            for name, read in (_in_tar if suffix == '.tar' else _in_parquet)(file):
                key = f'{item.key}/{_unused(name, used)}'
                shown = f'{item.name}/{name}'
                if '..' in PurePosixPath(name).parts or name.startswith('/') or '\0' in name:
                    yield Content(shown, f'{item.key}/{len(used)}', shown, None, f'{shown} leads out of its folder.')
                elif is_finished and is_finished(key):
                    yield Content(shown, key, shown, None, None)
                else:
                    yield Content(shown, key, shown, read(), None)
    except Exception as error:  # a damaged file, and whatever stores and networks raise
        reason = getattr(error, 'strerror', None) or first_line(error) or type(error).__name__
        yield Content(item.name, item.key, address, None, f'{address} cannot be read: {reason}')


def _unused(name: str, used: set[str]) -> str:
    """The name, with a number where a shard has it already."""
    names = itertools.chain([name], (f'{name}~{number}' for number in itertools.count(2)))
    unused = next(candidate for candidate in names if candidate not in used)
    used.add(unused)
    return unused


def _in_tar(file: io.BufferedIOBase) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The images of a WebDataset shard; its other files, such as labels, are passed over."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(size - len(TAR_END), 0))
    whole = file.read() == TAR_END
    file.seek(0)
    with tarfile.open(fileobj=file, mode='r|') as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if member.isfile() and path.suffix.lower() in IMAGE_SUFFIXES:
                yield str(path.with_suffix('')), lambda member=member: tar.extractfile(member).read()
    if not whole:  # of which tarfile says nothing
        raise ValueError('it is truncated: the end mark of a tar file is missing')


def _in_parquet(file: io.BufferedIOBase) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The images of a Parquet file: its one column of bytes, named by :data:`KEY_COLUMNS` or by their rows."""
    from pyarrow import parquet, types

    table = parquet.ParquetFile(file)
    binary = [
        field.name for field in table.schema_arrow if types.is_binary(field.type) or types.is_large_binary(field.type)
    ]
    if len(binary) != 1:
        raise ValueError(f'it has {len(binary)} columns of bytes ({", ".join(table.schema_arrow.names)}); expected one')
    named = next((name for name in KEY_COLUMNS if name in table.schema_arrow.names and name not in binary), None)
    rows = itertools.count()
    for batch in table.iter_batches(ROWS_AT_ONCE, columns=binary + [named] * (named is not None)):
        names = batch.column(named).to_pylist() if named else [f'{next(rows):08d}' for _ in range(len(batch))]
        for name, content in zip(names, batch.column(binary[0])):
            yield str(name), lambda content=content: content.as_py() or b''
