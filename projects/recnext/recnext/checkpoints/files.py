"""Reading and writing checkpoint files: the only place where this project opens one."""

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from ..utils.errors import UserError, first_line, printable
from ..utils.files import atomic_write

NUMBERED = re.compile(r'(?:iter|epoch)_(\d+)\.pth')

LISTED, LONGEST_NAME = 5, 120
"""How much of what a file says stands in an error."""

LARGEST_TEXT = 1 << 20
"""Bytes of code and the like, which TorchScript compresses."""

HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
HISTORY_STATISTICS = ('current', 'max', 'mean', 'min')


class CheckpointError(UserError):
    """A checkpoint file that cannot be read, or that is refused."""


class IgnoredHistory:
    """Stands in for mmengine's HistoryBuffer where a checkpoint is read without mmengine: what it holds is dropped."""

    def __setstate__(self, state: object) -> None:
        pass


def read_checkpoint(
    path: str | Path, map_location: str | torch.device | None = None, history: type = IgnoredHistory
) -> dict:
    """Read a checkpoint, a PyTorch file or safetensors, told apart by content, without running anything in it.

    Args:
        path: The file.
        map_location: Where the tensors go; None means the CPU.
        history: mmengine's HistoryBuffer, for who goes on with its log of scalars.

    Returns:
        What the file holds: a dict.

    Raises:
        CheckpointError: no such file, not a file, no permission, empty, truncated, damaged, not a checkpoint, or one
            that needs more than plain data and tensors, with the name of what it wanted.
    """
    path, device = Path(path), map_location or 'cpu'
    start = _first_bytes(path)
    try:
        # safetensors before pickles: they begin with a length, in which any byte may be a pickle's first.
        if start[8:9] == b'{' and not start.startswith(b'PK\x03\x04'):
            from safetensors.torch import load_file

            return load_file(path, device=str(device))
        if not start.startswith((b'PK\x03\x04', b'\x80')):
            raise CheckpointError(
                f'{path} is not a checkpoint: expected a PyTorch or safetensors file, found one that begins with '
                f'{start!r}.'
            )
        if start.startswith(b'PK'):
            _check_stored(path)
        with torch.serialization.safe_globals(logged_scalars(history)):
            checkpoint = torch.load(path, map_location=device, weights_only=True)
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'{path} is refused: it wants to run {_refused_name(path, error)} when it is read, and a checkpoint should '
            'hold only tensors and plain data. Nothing in it was run. Ask its author for the bare state dict.'
        ) from None
    except Exception as error:  # a damaged file can fail in any way
        reason = printable(first_line(error) or type(error).__name__, LONGEST_NAME)
        raise CheckpointError(
            f'{path} is truncated or damaged. Download or copy it again. (Reader: {reason})'
        ) from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'{path} is not a checkpoint: expected a dict, found {type(checkpoint).__name__}.')
    return checkpoint


def _check_stored(path: Path) -> None:
    """Refuse an archive that unpacks to much more than it is: PyTorch compresses no tensors."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 2 * path.stat().st_size + LARGEST_TEXT:
        raise CheckpointError(
            f'{path} would unpack to {unpacked / 1e6:.0f} MB, and PyTorch compresses nothing. '
            'Ask its author for the file as torch.save wrote it.'
        )


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


def _refused_name(path: Path, error: pickle.UnpicklingError) -> str:
    """Return what a refused file wanted to import, as far as torch tells."""
    with contextlib.suppress(Exception):
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            more = f', ... ({len(names)} in all)' if len(names) > LISTED else ''
            return ', '.join(printable(name, LONGEST_NAME) for name in names[:LISTED]) + more
    match = re.search(r'GLOBAL ([\w.]+)', str(error))
    return match[1] if match else 'code of its own'


def logged_scalars(history: type) -> list:
    """Return torch's safe globals for what mmengine writes beside tensors: its log of scalars, numpy's numbers, arrays.

    Args:
        history: mmengine's HistoryBuffer, or :class:`IgnoredHistory`.
    """
    from numpy._core import multiarray

    dtypes = [np.dtype, *(type(np.dtype(code)) for code in ('f2', 'f4', 'f8', 'i4', 'i8', '?'))]
    arrays = [np.ndarray]
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):  # numpy 2 | numpy 1
        arrays += [(multiarray._reconstruct, f'{module}._reconstruct'), (multiarray.scalar, f'{module}.scalar')]
    return [(history, HISTORY), (_statistic, 'builtins.getattr'), *arrays, *dtypes]


def _statistic(owner: object, name: str) -> Callable | None:
    """Return what mmengine's checkpoints need of ``getattr``: the statistics that a HistoryBuffer refers to."""
    # One function for either class: torch keeps those of the process and those of a block in one set, in any order.
    known = owner is IgnoredHistory or f'{getattr(owner, "__module__", "")}.{getattr(owner, "__name__", "")}' == HISTORY
    if not known or name not in HISTORY_STATISTICS:
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {name!r} is more than a log of scalars needs')
    return getattr(owner, name, None)


def write_checkpoint(checkpoint: Mapping, path: str | Path) -> None:
    """Write a PyTorch file: beside its place first, then renamed, so that no half of it is ever seen.

    The same content gives the same bytes, whatever the file is called.

    Raises:
        UserError: the folder does not exist, or the file cannot be written there.
    """
    path = _check_destination(path)
    # An open file, not a name: torch.save would write the name into the archive.
    with atomic_write(path) as beside, beside.open('wb') as file:
        torch.save(dict(checkpoint), file)


def write_safetensors(tensors: Mapping[str, torch.Tensor], path: str | Path, source: Mapping[str, object]) -> None:
    """Write bare tensors in the way of :func:`write_checkpoint`; ``source`` becomes the file's metadata, as text.

    Raises:
        UserError: the folder does not exist, or the file cannot be written there.
    """
    from safetensors.torch import save

    path = _check_destination(path)
    # timm and the hub look for the format.
    metadata = dict(format='pt', **{key: str(value) for key, value in source.items()})
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    with atomic_write(path) as beside:
        beside.write_bytes(save(tensors, metadata))


def _check_destination(path: str | Path) -> Path:
    path = Path(path)
    if not os.path.isdir(path.parent):
        raise CheckpointError(f'No such folder: {path.parent}. Create it, or choose another destination.')
    if os.path.isdir(path):
        raise CheckpointError(f'{path} is a folder; expected the name of a file to write.')
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f'{path} is a device or the like; expected the name of a file to write.')
    return path


def find_newest_checkpoint(folder: str | Path) -> str | None:
    """Return the ``iter_N.pth`` or ``epoch_N.pth`` of a work dir with the highest number; None if there is none."""
    found = [(int(match[1]), path) for path in Path(folder).glob('*.pth') if (match := NUMBERED.fullmatch(path.name))]
    return str(max(found)[1]) if found else None
