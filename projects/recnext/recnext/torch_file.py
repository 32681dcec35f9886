"""PyTorch's checkpoint files read as data: nothing in them is imported, and nothing is called but what stands here.

Such a file is a pickle and beside it the bytes of the tensors. A pickle is a program; this is an interpreter of the
part of its language in which plain data and tensors are written. What a file names is looked up in a table of this
module, and what it declares is held against the bytes that are there, so that it takes no more memory than its size
accounts for. ``torch.load(weights_only=True)`` leaves the checksums unread, allocates what a file declares, and crashes
the interpreter on a key that is nested deeply.

Sources of the formats: pickletools for the opcodes, torch.serialization for the two layouts.
"""

import contextlib
import io
import itertools
import math
import pickletools
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

MOST_STEPS = 1_000_000
"""Opcodes of a pickle and elements that it copies. The largest released segmentor with its optimizer takes 100 000."""

MOST_DIMENSIONS = 64
"""Of a tensor, as PyTorch's own operations have it."""

LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
"""How the files of PyTorch before 1.6 begin."""

HISTORY_STATISTICS = ('current', 'max', 'mean', 'min')
BLOCK = 1 << 20

DTYPES = {
    f'torch.{name}Storage': dtype
    for name, dtype in dict(
        Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
        Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool,
    ).items()
}  # fmt: skip
VALUES = {
    **DTYPES,
    **{str(dtype): dtype for dtype in DTYPES.values()},
    'numpy.ndarray': np.ndarray,
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
}
"""Names that stand for themselves. The type of a storage is the dtype of its elements."""

NUMPY_DTYPES = ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1')
LITERALS = ('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'BINSTRING', 'SHORT_BINSTRING')
CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
EMPTY = {'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}
TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
GET = ('BINGET', 'LONG_BINGET')
PUT = ('BINPUT', 'LONG_BINPUT')


class NotDataError(Exception):
    """A file that wants more than data; the message says what."""


class TorchScriptError(Exception):
    """A program that was compiled by TorchScript."""


class DamagedError(Exception):
    """A file that says what cannot be; the message says what."""


@dataclass(frozen=True)
class _Storage:
    """The bytes of one or more tensors, (N,) of uint8, and what they are."""

    content: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class _Call:
    """A name that a pickle may call, and what is called in its place."""

    name: str
    function: Callable


def read_torch_file(path: Path, device: str | torch.device) -> object:
    """What is in a file that :func:`torch.save` wrote, in its present format or in that of PyTorch before 1.6.

    Tensors keep their strides, and what shared memory shares it; parameters come as tensors.

    Raises:
        NotDataError: it wants something that is neither plain data nor a tensor.
        Exception: of any kind; it is damaged.
    """
    with path.open('rb') as file:
        start, size = file.read(4), file.seek(0, io.SEEK_END)
        file.seek(0)
        return _read_zip(file, size, device) if start == b'PK\x03\x04' else _read_legacy(file, size, device)


def _read_zip(file: BinaryIO, size: int, device: str | torch.device) -> object:
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        roots = [name.removesuffix('/data.pkl') for name in names if name.endswith('/data.pkl')]
        if any(f'{root}/constants.pkl' in names for root in roots):
            raise TorchScriptError
        if len(roots) != 1:
            raise DamagedError(f'found {len(roots)} data.pkl in the archive, expected one')
        if len(set(names)) != len(names):
            raise DamagedError('two members of the archive have the same name')
        if any((m.compress_type, m.compress_size) != (zipfile.ZIP_STORED, m.file_size) for m in members):
            raise DamagedError('the archive is compressed; torch.save does not compress')
        if sum(member.file_size for member in members) > size:
            raise DamagedError('the members of the archive are larger than the archive')
        if f'{roots[0]}/byteorder' in names and archive.read(f'{roots[0]}/byteorder') != b'little':
            raise DamagedError('numbers are stored with the highest byte first')
        contents = {}

        def load(key: str, nbytes: int) -> Tensor:
            if key not in contents:
                contents[key] = _read_member(archive, f'{roots[0]}/data/{key}').to(device)
            if len(contents[key]) != nbytes:
                raise DamagedError(f'storage {key} has {len(contents[key])} bytes, expected {nbytes}')
            return contents[key]

        content = archive.read(f'{roots[0]}/data.pkl')
        return _Interpreter(load, len(content)).run(io.BytesIO(content))


def _read_member(archive: zipfile.ZipFile, name: str) -> Tensor:
    """The bytes of a member; zipfile compares their checksum at the end."""
    with archive.open(name) as stream:
        return _read_bytes(stream, archive.getinfo(name).file_size)


def _read_bytes(stream: BinaryIO, size: int) -> Tensor:
    """So many bytes, (size,) of uint8."""
    content = torch.empty(size, dtype=torch.uint8)
    place, filled = memoryview(content.numpy()), 0
    while filled < size:
        block = stream.read(min(BLOCK, size - filled))
        if not block:
            raise DamagedError(f'{size} bytes were expected, {filled} are there')
        place[filled : filled + len(block)] = block
        filled += len(block)
    return content


def _read_legacy(file: BinaryIO, size: int, device: str | torch.device) -> object:
    """Five pickles, then every storage: its number of elements, 8 bytes, and the elements."""
    contents, bytes_left = {}, size

    def load(key: str, nbytes: int) -> Tensor:
        nonlocal bytes_left
        if key not in contents:
            bytes_left -= nbytes
            if bytes_left < 0:
                raise DamagedError('the tensors are larger than the file')
            contents[key] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        if len(contents[key]) != nbytes:
            raise DamagedError(f'storage {key} has two sizes')
        return contents[key]

    interpreter = _Interpreter(load, size)
    magic, version, system = (interpreter.run(file) for _ in range(3))
    if (magic, version) != (LEGACY_MAGIC, LEGACY_VERSION):
        raise DamagedError('a pickle, but not one of torch.save')
    if not isinstance(system, dict) or system.get('little_endian') is not True:
        raise DamagedError('numbers are stored with the highest byte first')
    found, keys = interpreter.run(file), interpreter.run(file)
    if not isinstance(keys, list) or sorted(keys) != sorted(contents):
        raise DamagedError('the list of storages is not that of the tensors')
    for key in keys:
        elements, nbytes = int.from_bytes(file.read(8), 'little'), len(contents[key])
        # How wide the elements are, the tensors say; whether that is one of the possible widths, the number tells.
        if nbytes not in (elements, 2 * elements, 4 * elements, 8 * elements):
            raise DamagedError(f'a storage has {elements} elements, expected {nbytes} bytes')
        contents[key].copy_(_read_bytes(file, nbytes))
    if file.read(1):
        raise DamagedError('more bytes follow the last tensor')
    return found


class _Interpreter:
    """Runs pickles that hold plain data and tensors; what a file may call is ``self.calls``."""

    def __init__(self, load: Callable[[str, int], Tensor], size: int) -> None:
        """
        Args:
            load: The storage of a key and a number of bytes.
            size: Of the pickles in bytes; no text is copied often enough to take a multiple of it.
        """
        self.load = load
        self.steps_left, self.bytes_left = MOST_STEPS, 4 * size
        self.calls = {
            'collections.OrderedDict': lambda: OrderedDict(),
            'collections.Counter': self._counter,
            'builtins.set': self._set,
            'builtins.getattr': _history_statistic,
            '_codecs.encode': self._encode,
            'torch.Size': _size,
            'torch.device': torch.device,
            'torch._utils._rebuild_tensor_v2': _tensor,
            'torch._utils._rebuild_parameter': lambda data, requires_grad, hooks: data,
            'numpy.dtype': _numpy_dtype,
        }
        for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):  # numpy 2 | numpy 1
            self.calls |= {f'{module}._reconstruct': _reconstruct, f'{module}.scalar': _scalar}

    def run(self, file: BinaryIO) -> object:
        """The value of the pickle that begins here; the file is left behind it."""
        stack, below, memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            self._spend(1)
            if name in PUT:
                memo[argument] = stack[-1]
            elif name in GET:
                stack.append(memo[argument])
            elif name in LITERALS:
                stack.append(argument)
            elif name in CONSTANTS:
                stack.append(CONSTANTS[name])
            elif name in EMPTY:
                stack.append(EMPTY[name]())
            elif name in TUPLES:
                stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
            elif name == 'MARK':
                below.append(stack)
                stack = []
            elif name == 'TUPLE':
                items, stack = stack, below.pop()
                stack.append(tuple(items))
            elif name == 'REDUCE':
                arguments = stack.pop()
                stack[-1] = _call(stack[-1], arguments)
            elif name == 'SETITEM':
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            elif name == 'SETITEMS':
                items, stack = stack, below.pop()
                _set_items(stack[-1], items)
            elif name == 'APPEND':
                item = stack.pop()
                _extend(stack[-1], [item])
            elif name == 'APPENDS':
                items, stack = stack, below.pop()
                _extend(stack[-1], items)
            elif name == 'GLOBAL':
                stack.append(self._named(argument))
            elif name == 'BINPERSID':
                stack.append(self._storage(stack.pop()))
            elif name == 'NEWOBJ':
                arguments = stack.pop()
                stack[-1] = _new(stack[-1], arguments)
            elif name == 'BUILD':
                state = stack.pop()
                self._build(stack[-1], state)
            elif name == 'STOP':
                (found,) = stack
                return found
            elif name != 'PROTO':
                raise NotDataError(f'the opcode {name}')
        raise DamagedError('a pickle ends in the middle')

    def _spend(self, steps: int) -> None:
        self.steps_left -= steps
        if self.steps_left < 0:
            raise DamagedError(f'more than {MOST_STEPS} entries')

    def _spend_bytes(self, number: int) -> None:
        self.bytes_left -= number
        if self.bytes_left < 0:
            raise DamagedError('it copies the same bytes again and again')

    def _named(self, argument: str) -> object:
        name = _python3_name(argument)
        if name in VALUES:
            return VALUES[name]
        if name in self.calls:
            return _Call(name, self.calls[name])
        raise NotDataError(name)

    def _storage(self, identity: object) -> _Storage:
        match identity:
            case ('storage', torch.dtype() as dtype, str(key), str(), int(numel)) if numel >= 0:
                pass
            case ('storage', torch.dtype() as dtype, str(key), str(), int(numel), None) if numel >= 0:
                pass
            case _:
                raise DamagedError('a storage that is described in no known way')
        return _Storage(self.load(key, numel * dtype.itemsize), dtype)

    def _build(self, owner: object, state: object) -> None:
        """Fill what was made empty: the few kinds of object that are written in two steps."""
        match owner, state:
            case OrderedDict(), {'_metadata': dict() as versions, **rest} if not rest:
                owner._metadata = versions
            case np.dtype(), (3, '<' | '|', None, None, None, -1, -1, 0):
                pass
            case np.ndarray(), (1, tuple(shape), np.dtype() as dtype, bool(fortran), bytes(content)):
                if len(shape) > MOST_DIMENSIONS or not all(type(n) is int and n >= 0 for n in shape):
                    raise DamagedError('an array of an impossible shape')
                self._spend_bytes(len(content))
                owner.__setstate__((1, shape, dtype, fortran, content))
            case HistoryBuffer(), {
                'max_length': int(length),
                '_log_history': np.ndarray() as log,
                '_count_history': np.ndarray() as counts,
            }:
                owner.max_length, owner._log_history, owner._count_history = length, log, counts
            case _:
                raise NotDataError(f'to change a {type(owner).__name__}')

    def _encode(self, text: str, encoding: str) -> bytes:
        """How Python 2's pickles hold bytes."""
        if type(text) is not str or encoding != 'latin1':
            raise NotDataError('_codecs.encode to something else than bytes')
        self._spend_bytes(len(text))
        return text.encode('latin1')

    def _set(self, items: list) -> set:
        if type(items) is not list or not all(type(item) in (str, int) for item in items):
            raise NotDataError('a set of something else than words and whole numbers')
        self._spend(len(items))
        return set(items)

    def _counter(self, items: dict) -> Counter:
        if type(items) is not dict:
            raise NotDataError('a counter of something else than a dict')
        self._spend(len(items))
        return Counter(items)


def _call(function: object, arguments: object) -> object:
    if type(function) is not _Call or type(arguments) is not tuple:
        raise NotDataError('to call something that is not a name')
    return function.function(*arguments)


def _new(kind: object, arguments: object) -> HistoryBuffer:
    if kind is not HistoryBuffer or arguments != ():
        raise NotDataError('a new object of a kind that is not known')
    return HistoryBuffer()


def _set_items(owner: object, items: list) -> None:
    if type(owner) not in (dict, OrderedDict):
        raise NotDataError(f'to set items of a {type(owner).__name__}')
    keys, values = items[::2], items[1::2]
    # Nothing else is needed, and to hash what is nested deeply would overflow the interpreter's stack.
    if not all(type(key) in (str, int) for key in keys):
        raise DamagedError('a key that is neither a word nor a whole number')
    owner.update(zip(keys, values, strict=True))


def _extend(owner: object, items: list) -> None:
    if type(owner) is not list:
        raise NotDataError(f'to append to a {type(owner).__name__}')
    owner.extend(items)


def _size(sizes: tuple) -> torch.Size:
    if type(sizes) is not tuple or len(sizes) > MOST_DIMENSIONS:
        raise DamagedError('the size of a tensor is no short tuple')
    return torch.Size(sizes)


def _tensor(
    storage: _Storage,
    offset: int,
    size: tuple,
    stride: tuple,
    requires_grad: bool,
    hooks: object,
    metadata: object = None,
) -> Tensor:
    """A tensor of so many elements inside its storage; ``requires_grad`` and hooks are of no use to weights."""
    if type(storage) is not _Storage or metadata:
        raise DamagedError('a tensor that is described in no known way')
    if type(size) is not tuple or type(stride) is not tuple or not len(size) == len(stride) <= MOST_DIMENSIONS:
        raise DamagedError('a tensor whose size and strides do not match')
    if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
        raise DamagedError('a tensor with a size or stride that is no number of elements')
    numbers = storage.content.view(storage.dtype)
    elements = math.prod(size)
    end = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride)) if elements else offset
    if end > len(numbers) or elements > len(numbers):
        raise DamagedError(f'a tensor of {elements} elements reaches beyond its storage of {len(numbers)}')
    return numbers.as_strided(size, stride, offset)


def _history_statistic(owner: object, name: str) -> Callable:
    """All that mmengine's checkpoints need of ``getattr``: the statistics that a HistoryBuffer refers to."""
    if owner is not HistoryBuffer or name not in HISTORY_STATISTICS:
        raise NotDataError('builtins.getattr of more than a log of scalars needs')
    return getattr(owner, name)


def _numpy_dtype(code: str, align: bool, copy: bool) -> np.dtype:
    if code not in NUMPY_DTYPES:
        raise NotDataError('a numpy array of something else than numbers')
    return np.dtype(code)


def _scalar(dtype: np.dtype, content: bytes) -> np.generic:
    (number,) = np.frombuffer(content, dtype)
    return number


def _reconstruct(kind: object, shape: object, code: object) -> np.ndarray:
    if kind is not np.ndarray:
        raise NotDataError('an array of a kind that is not known')
    return np.empty(0)


def find_names(path: Path) -> list[str]:
    """What a file would have a reader import beyond what stands here, in its order, found without running it."""
    with path.open('rb') as file:
        if file.read(4) == b'PK\x03\x04':
            with zipfile.ZipFile(file) as archive:
                (pickled,) = (name for name in archive.namelist() if name.endswith('/data.pkl'))
                return _unknown_names(io.BytesIO(archive.read(pickled)))
        file.seek(0)
        return _unknown_names(file)


def _unknown_names(file: BinaryIO) -> list[str]:
    known = {*VALUES, *_Interpreter(lambda key, nbytes: None, 0).calls}
    found, strings = {}, []
    with contextlib.suppress(Exception):  # where it ends, or makes no sense any more
        for opcode, argument, _ in itertools.islice(_opcodes_of_all(file), MOST_STEPS):
            if opcode.name in ('GLOBAL', 'INST'):
                found[_python3_name(argument)] = None
            elif opcode.name == 'STACK_GLOBAL':
                found['.'.join(strings)] = None
            elif isinstance(argument, str):
                strings = [*strings[-1:], argument]
    return [name for name in found if name not in known]


def _opcodes_of_all(file: BinaryIO) -> Iterator[tuple]:
    """The opcodes of one pickle after the other."""
    while True:
        yield from pickletools.genops(file)


def _python3_name(argument: str) -> str:
    return argument.replace(' ', '.').replace('__builtin__.', 'builtins.')
