"""Reading and writing checkpoint files: the only place where this project opens one."""

import contextlib
import hashlib
import os
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from .errors import UserError
from .transfer import fetch

NUMBERED = re.compile(r'(?:iter|epoch)_(\d+)\.pth')
PARTIAL = '.partial'
HISTORY_STATISTICS = ('current', 'max', 'mean', 'min')


class CheckpointError(UserError):
    """A checkpoint file that cannot be read, or that is refused."""


def _history_statistic(owner: object, name: str) -> Callable:
    """All that mmengine's checkpoints need of ``getattr``: the statistics that a HistoryBuffer refers to."""
    if owner is not HistoryBuffer or name not in HISTORY_STATISTICS:
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {name!r} is more than a log of scalars needs')
    return getattr(owner, name)


def _logged_scalars() -> list:
    """What mmengine writes into a checkpoint beside tensors: its log of scalars, numpy numbers and arrays."""
    from numpy._core import multiarray

    dtypes = [np.dtype, *(type(np.dtype(code)) for code in ('f2', 'f4', 'f8', 'i4', 'i8', '?'))]
    arrays = [np.ndarray]
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):  # numpy 2 | numpy 1
        arrays += [(multiarray._reconstruct, f'{module}._reconstruct'), (multiarray.scalar, f'{module}.scalar')]
    return [HistoryBuffer, (_history_statistic, 'builtins.getattr'), *arrays, *dtypes]


def read_checkpoint(path: str | Path, map_location: str | torch.device | None = None) -> dict:
    """Read a checkpoint, a PyTorch file or safetensors, told apart by content, without running anything in it.

    Args:
        path: The file.
        map_location: Where the tensors go, as in :func:`torch.load`; None means the CPU.

    Returns:
        What the file holds: a dict.

    Raises:
        CheckpointError: no such file, not a file, no permission, empty, truncated, not a checkpoint, or one that
            needs more than plain data and tensors, with the name of what it wanted.
    """
    path, device = Path(path), map_location or 'cpu'
    start = _first_bytes(path)
    if start.startswith((b'PK\x03\x04', b'\x80')):
        checkpoint = _read_torch(path, device)
    elif start[8:9] == b'{':
        checkpoint = _read_safetensors(path, device)
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
    with torch.serialization.safe_globals(_logged_scalars()):
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except pickle.UnpicklingError as error:
            raise _refused(path, _wanted(path, str(error))) from None
        except Exception as error:  # a damaged file can fail in any way
            if 'TorchScript' in str(error):
                raise CheckpointError(f'{path} is a TorchScript program; expected a checkpoint of weights.') from None
            raise _damaged(path, error) from None


def _wanted(path: Path, reason: str) -> str:
    """The names that a refused file would have imported: of a zip or a bare pickle all of them, else the first."""
    for names in (torch.serialization.get_unsafe_globals_in_checkpoint, _pickled_globals):
        with contextlib.suppress(Exception):
            if found := names(path):
                return ', '.join(found)
    match = re.search(r'GLOBAL ([\w.]+)', reason)
    return match[1] if match else 'code of its own'


def _pickled_globals(path: Path) -> list[str]:
    """Every global that a bare pickle names, found without executing it."""
    found, strings = [], []
    with path.open('rb') as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == 'GLOBAL':
                found.append(argument.replace(' ', '.'))
            elif opcode.name == 'STACK_GLOBAL':
                found.append('.'.join(strings))
            elif isinstance(argument, str):
                strings = [*strings[-1:], argument]
    return found


def _refused(path: Path, wanted: str) -> CheckpointError:
    return CheckpointError(
        f'{path} is refused: it wants to run {wanted} when it is read, and a checkpoint should hold only tensors '
        'and plain data. Nothing in it was run. Ask its author for the bare state dict.'
    )


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return CheckpointError(f'{path} is truncated or damaged. Download or copy it again. (Reader: {reason})')


def _read_safetensors(path: Path, device: str | torch.device) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
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

    Args:
        path: Of the file.
        write: Called with the open file.
        beside: Where to write first, on the same file system; a name beside ``path`` if None.

    Raises:
        CheckpointError: it cannot be written; what was there stays.
    """
    beside = beside or path.with_name(f'.{os.getpid()}{PARTIAL}')
    try:
        with beside.open('xb') as file:
            write(file)
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
