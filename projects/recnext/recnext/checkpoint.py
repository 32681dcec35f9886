"""Reading and writing checkpoint files: the only place where this project opens one."""

import contextlib
import hashlib
import os
import pickle
import re
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlparse

import torch

from .errors import UserError, first_line, printable
from .torch_file import TorchScriptError, find_names, read_torch_file
from .transfer import fetch

NUMBERED = re.compile(r'(?:iter|epoch)_(\d+)\.pth')
PARTIAL = '.partial'
LARGEST_HEADER = 1 << 22
"""Of a safetensors file in bytes. That of the largest released segmentor has 200 000."""

LISTED, LONGEST_NAME = 5, 120
"""How much of what a file says stands in an error."""


class CheckpointError(UserError):
    """A checkpoint file that cannot be read, or that is refused."""


def read_checkpoint(path: str | Path, map_location: str | torch.device | None = None) -> dict:
    """Read a checkpoint, a PyTorch file or safetensors, told apart by content, without running anything in it.

    Args:
        path: The file.
        map_location: Where the tensors go; None means the CPU.

    Returns:
        What the file holds: a dict.

    Raises:
        CheckpointError: no such file, not a file, no permission, empty, truncated, damaged, not a checkpoint, or one
            that needs more than plain data and tensors, with the name of what it wanted.
    """
    path, device = Path(path), map_location or 'cpu'
    start = _first_bytes(path)
    # safetensors before pickles: they begin with a length, in which any byte may be a pickle's first.
    if start[8:9] == b'{' and not start.startswith(b'PK\x03\x04'):
        checkpoint = _read_safetensors(path, device, int.from_bytes(start[:8], 'little'))
    elif start.startswith((b'PK\x03\x04', b'\x80')):
        checkpoint = _read_torch(path, device)
    else:
        raise CheckpointError(
            f'{path} is not a checkpoint: expected a PyTorch or safetensors file, found one that begins with {start!r}.'
        )
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} is not a checkpoint: expected a dict, found {type(checkpoint).__name__}.')
    return checkpoint


def download(url: str) -> Path:
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


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open('rb') as file:
            start = file.read(16)
    except FileNotFoundError:
        raise CheckpointError(f'No such checkpoint: {path}') from None
    except IsADirectoryError:
        raise CheckpointError(f'{path} is a folder; expected a checkpoint file in it.') from None
    except PermissionError:
        raise CheckpointError(f'No permission to read {path}; see its owner and mode with ls -l.') from None
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from None
    if not start:
        raise CheckpointError(f'{path} is empty (0 bytes). Download or copy it again.')
    return start


def _read_torch(path: Path, device: str | torch.device) -> object:
    try:
        return read_torch_file(path, device)
    except torch.OutOfMemoryError:
        raise
    except TorchScriptError:
        raise CheckpointError(f'{path} is a TorchScript program; expected a checkpoint of weights.') from None
    except pickle.UnpicklingError as error:
        raise _refused(path, find_names(path, str(error))) from None
    except Exception as error:  # a damaged file can fail in any way
        raise _damaged(path, error) from None


def _refused(path: Path, wanted: list[str]) -> CheckpointError:
    names = ', '.join(printable(name, LONGEST_NAME) for name in wanted[:LISTED])
    more = f', ... ({len(wanted)} in all)' if len(wanted) > LISTED else ''
    return CheckpointError(
        f'{path} is refused: it wants to run {names}{more} when it is read, and a checkpoint should hold only tensors '
        'and plain data. Nothing in it was run. Ask its author for the bare state dict.'
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = printable(first_line(error) or type(error).__name__, LONGEST_NAME)
    return CheckpointError(f'{path} is truncated or damaged. Download or copy it again. (Reader: {reason})')


def _read_safetensors(path: Path, device: str | torch.device, size_of_header: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    if size_of_header > LARGEST_HEADER:
        raise CheckpointError(
            f'{path} is refused: found a header of {size_of_header} bytes, expected at most {LARGEST_HEADER}.'
        )
    try:
        return load_file(path, device=str(device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _damaged(path, error) from None


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_checkpoint(checkpoint: Mapping, path: str | Path) -> None:
    """Write a PyTorch file: beside its place first, then renamed, so that no half of it is ever seen.

    The same content gives the same bytes, whatever the file is called.

    Raises:
        CheckpointError: the folder does not exist, or the file cannot be written there.
    """
    # An open file, not a name: torch.save would write the name into the archive.
    _write_weights(path, lambda file: torch.save(dict(checkpoint), file))


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: str | Path, source: Mapping[str, object]) -> None:
    """Write bare tensors in the way of :func:`write_checkpoint`; ``source`` becomes the file's metadata, as text.

    Raises:
        CheckpointError: the folder does not exist, or the file cannot be written there.
    """
    from safetensors.torch import save

    # timm and the hub look for the format.
    metadata = dict(format='pt', **{key: str(value) for key, value in source.items()})
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    _write_weights(path, lambda file: file.write(save(tensors, metadata)))


def _write_weights(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    path = Path(path)
    if not os.path.isdir(path.parent):
        raise CheckpointError(f'No such folder: {path.parent}. Create it, or choose another destination.')
    if os.path.isdir(path):
        raise CheckpointError(f'{path} is a folder; expected the name of a file to write.')
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f'{path} is a device or the like; expected the name of a file to write.')
    write_atomically(path, write)


def write_atomically(path: Path, write: Callable[[BinaryIO], object], beside: Path | None = None) -> None:
    """Write a file beside its place, through to the disk, and rename it: it is there in full or as it was before.

    A file that was there before passes its mode on; of several processes that write at once, the last one's stays.

    Args:
        path: Of the file.
        write: Called with the open file.
        beside: Where to write first, on the same file system; a name beside ``path`` if None.

    Raises:
        CheckpointError: it cannot be written; what was there stays.
    """
    # Not the number of the process: in a container it is the same every time.
    beside = beside or path.with_name(f'.{secrets.token_hex(8)}{PARTIAL}')
    try:
        with beside.open('xb') as file:
            write(file)
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(f'{path} cannot be written: {error}') from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def remove_partial_files(folder: str | Path) -> None:
    """Remove what :func:`write_atomically` left in a work dir when it was killed; no other process may write there."""
    for path in Path(folder).glob(f'.*{PARTIAL}'):
        path.unlink(missing_ok=True)


def numbered_checkpoints(folder: str | Path) -> list[Path]:
    """The files ``iter_N.pth`` or ``epoch_N.pth`` in a work dir, the highest N first."""
    found = [(int(match[1]), path) for path in Path(folder).glob('*.pth') if (match := NUMBERED.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def find_newest_checkpoint(folder: str | Path) -> str | None:
    """The numbered checkpoint of a work dir with the highest number; None if there is none."""
    return next(map(str, numbered_checkpoints(folder)), None)
