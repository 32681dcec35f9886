"""What a PyTorch file may be before and after torch.load reads it.

``torch.load(weights_only=True)`` runs nothing of a file, but it believes what the file says of itself. It leaves the
checksums of the archive unread, ends the process by a signal on a key that is nested deeply, copies what a pickle says
to copy as often as it says so, and makes views that are larger than their bytes. Here a file is held against the bytes
that are there.

Sources of the formats: pickletools for the opcodes, torch.serialization for the two layouts.
"""

import contextlib
import io
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

MOST_STEPS = 1_000_000
"""Opcodes of a pickle. The largest released segmentor with its optimizer takes 100 000."""

MOST_NESTED = 50
"""How deep things may stand in each other. Those of a released segmentor with its optimizer do so 8 deep."""

MOST_COPIED = 8
"""Times the size of a pickle that it may have copied by what it calls."""

END_OF_ARCHIVE = b'PK\x05\x06', 22
"""Signature and size of the last record of an archive without a comment."""

FOLDER = 0x10
"""The attribute of MS-DOS's folders."""

OF_TENSORS = re.compile(r'torch\._utils\._rebuild_\w+|torch\.\w+Storage|collections\.OrderedDict')
HISTORY_STATISTICS = ('current', 'max', 'mean', 'min')
MUTATORS = ('APPEND', 'APPENDS', 'SETITEM', 'SETITEMS', 'ADDITEMS', 'BUILD')
GET, PUT = ('GET', 'BINGET', 'LONG_BINGET'), ('PUT', 'BINPUT', 'LONG_BINPUT')
TUPLES = ('TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'EMPTY_TUPLE')
CALLS = ('REDUCE', 'NEWOBJ', 'NEWOBJ_EX')
PICKLES_OF_LEGACY_FILE = 5
"""Magic number, version, system, what was saved, and the keys of the storages, which follow."""


class TorchScriptError(Exception):
    """A program that was compiled by TorchScript."""


class DamagedError(Exception):
    """A file that says what cannot be; the message says what."""


def read_torch_file(path: Path, device: str | torch.device) -> object:
    """What is in a file that :func:`torch.save` wrote, in its present format or in that of PyTorch before 1.6.

    Raises:
        pickle.UnpicklingError: it wants more than plain data and tensors.
        Exception: of any other kind; it is damaged.
    """
    with path.open('rb') as file:
        if file.read(4) == b'PK\x03\x04':
            _check_archive(file)
        else:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            for _ in range(PICKLES_OF_LEGACY_FILE):
                if file.tell() < size:  # else it is another pickle, and torch.load says of what
                    _check_pickle(file, size)
    with torch.serialization.safe_globals(_logged_scalars()):
        content = torch.load(path, map_location=device, weights_only=True)
    _check_content(content)
    return content


def _check_archive(file: BinaryIO) -> None:
    signature, size = END_OF_ARCHIVE
    file.seek(-size, os.SEEK_END)
    if not file.read().startswith(signature):
        # Two readers could find two directories in it.
        raise DamagedError('the archive does not end with its directory')
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if any(name.endswith('/constants.pkl') for name in names):
            raise TorchScriptError
        if len(set(names)) < len(names):
            raise DamagedError('two members of the archive have the same name')
        if any(member.external_attr & FOLDER for member in members):
            # torch.load would take it for one, and leave what was in memory before in the place of its bytes.
            raise DamagedError('a member of the archive is a folder')
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise DamagedError('the archive is compressed; torch.save does not compress')
        if sum(member.file_size for member in members) > file.tell():
            raise DamagedError('the members of the archive are larger than the archive')
        if damaged := archive.testzip():
            raise DamagedError(f'the checksum of {damaged} is wrong')
        for name in names:
            if name.endswith('/data.pkl'):
                content = archive.read(name)
                _check_pickle(io.BytesIO(content), len(content))


@dataclass(eq=False)
class _Item:
    """What is known of an object that a pickle would make, without making it."""

    depth: int
    """How deep things stand in it."""

    size: int
    """How many entries and letters it has."""

    value: object = None
    """Of a word or a name; of a tuple, its items."""


def _check_pickle(file: BinaryIO, size: int) -> None:
    """Go through a pickle without running it, as ``pickletools.dis`` does, and leave the file behind it."""
    stack, memo, copied = [], {}, 0
    for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name, before = opcode.name, opcode.stack_before
        if pickletools.markobject in before:
            mark = len(stack) - 1 - stack[::-1].index(pickletools.markobject)
            start = mark - before.index(pickletools.markobject)
        else:
            start = len(stack) - len(before)
        if start < 0 or step > MOST_STEPS:
            raise DamagedError(f'a pickle of more than {MOST_STEPS} steps' if start >= 0 else 'a pickle without sense')
        taken = [item for item in stack[start:] if item is not pickletools.markobject]
        del stack[start:]
        if name in CALLS:
            _check_call(*taken)
            copied += taken[1].size
        if name in MUTATORS:
            owner = taken.pop(0)
            owner.depth = max(owner.depth, 1 + _depth(taken))
            owner.size += sum(item.size for item in taken)
            stack.append(owner)
        elif name in GET:
            stack.append(memo[argument])
        elif name in PUT:
            memo[argument] = stack[-1]
        elif name == 'MEMOIZE':
            memo[len(memo)] = taken[0]
            stack += taken
        elif name == 'DUP':
            stack += 2 * taken
        elif name == 'MARK':
            stack.append(pickletools.markobject)
        elif opcode.stack_after:
            length = len(argument) if isinstance(argument, (str, bytes)) else 0
            value = taken if name in TUPLES else argument
            stack.append(_Item(1 + _depth(taken), 1 + length + sum(item.size for item in taken), value))
            if stack[-1].depth > MOST_NESTED:
                raise DamagedError(f'things stand in each other more than {MOST_NESTED} deep')
        if copied > MOST_COPIED * size:
            raise DamagedError('it copies the same again and again')


def _check_call(function: _Item, arguments: _Item, *_: _Item) -> None:
    """Bytes are written as text and an encoding, latin1; others are slow, or modules that are imported first."""
    if function.value == '_codecs encode' and [item.value for item in arguments.value[1:]] != ['latin1']:
        raise DamagedError('bytes in another encoding than latin1')


def _depth(items: Iterable[_Item]) -> int:
    return max((item.depth for item in items), default=0)


def _check_content(content: object) -> None:
    """Go through dicts, lists, tuples and sets, which may hold each other."""
    seen, left = set(), [content]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            _check_tensor(item)
        elif isinstance(item, dict):
            if not all(isinstance(key, (str, int)) for key in item):
                raise DamagedError('a key that is neither a word nor a whole number')
            left += item.values()
        elif isinstance(item, (list, tuple, set)):
            left += item


def _check_tensor(tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        raise DamagedError('a tensor that is sparse, nested, quantised or without numbers')
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise DamagedError(f'a tensor of {tensor.numel()} elements in {tensor.untyped_storage().nbytes()} bytes')


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


def find_names(path: Path, reason: str) -> list[str]:
    """What a refused file wanted to import: of a zip or a bare pickle all of it, else what the refusal names."""
    for names in (torch.serialization.get_unsafe_globals_in_checkpoint, _pickled_names):
        with contextlib.suppress(Exception):
            if found := names(path):
                return found
    match = re.search(r'GLOBAL ([\w.]+)', reason)
    return [match[1] if match else 'code of its own']


def _pickled_names(path: Path) -> list[str]:
    """What a bare pickle names beyond tensors, found without running it."""
    found, strings = [], []
    with path.open('rb') as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == 'GLOBAL':
                found.append(argument.replace(' ', '.'))
            elif opcode.name == 'STACK_GLOBAL':
                found.append('.'.join(strings))
            elif isinstance(argument, str):
                strings = [*strings[-1:], argument]
    return [name for name in found if not OF_TENSORS.fullmatch(name)]
