"""Files from strangers: variants of good checkpoints, made from a seed, and what a reader must make of each."""

import hashlib
import io
import json
import pickletools
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from safetensors.torch import save

REFUSED = 'refused'
RIGHT = 'right weights'
EITHER = 'refused, or the right weights'
AS_SAID = 'refused, or what the file says'  # its checksums were made anew: no reader can know what was meant
ONE_BYTE = 'refused, or the right weights but for the byte that was changed'  # the format has no checksum

CANARY = 'canary'
"""What every payload tries to make, in the working directory."""

MILLION = 10**6

PLANNED = 4200
"""How many variants there are at most before bytes are changed at random."""


class Variant(NamedTuple):
    """A file.

    Attributes:
        kind: Of attack; a sample has one of each at least.
        name: Of the attack.
        content: Of the file.
        verdict: What a reader must make of it.
    """

    kind: str
    name: str
    content: bytes
    verdict: str


class Good(NamedTuple):
    """A good file: its name, its bytes, what holds them, and what is in it.

    The ``container`` is ``'zip'``, ``'legacy'`` or ``'safetensors'``.
    """

    name: str
    content: bytes
    container: str
    checkpoint: dict


def make_variants(goods: list[Good], number: int, seed: int = 0) -> Iterator[Variant]:
    """About so many variants, at least one of every kind; from :data:`PLANNED` on all. The same for the same seed."""
    chance, kinds, made = random.Random(seed), set(), {hashlib.sha256(good.content).digest() for good in goods}
    for variant in (variant for good in goods for variant in _planned(good, random.Random(seed))):
        if variant.kind not in kinds or chance.random() < number / PLANNED:
            kinds.add(variant.kind)
            if _is_new(variant, made):
                yield variant
    for variant in _flips(goods, chance):
        if len(made) >= number + len(goods):
            return
        if _is_new(variant, made):
            yield variant


def _is_new(variant: Variant, made: set[bytes]) -> bool:
    """Whether no other variant has these bytes; now one has."""
    digest, before = hashlib.sha256(variant.content).digest(), len(made)
    made.add(digest)
    return len(made) > before


def _planned(good: Good, chance: random.Random) -> Iterator[Variant]:
    attacks = {'zip': [zips, pickles, tensors], 'legacy': [legacy, pickles, tensors], 'safetensors': [safetensors]}
    for attack in (bytes_changed, truncations, *attacks[good.container]):
        for kind, name, content, verdict in attack(good, chance):
            yield Variant(f'{good.container}: {kind}', f'{good.name}: {name}', content, verdict)


def _flips(goods: list[Good], chance: random.Random) -> Iterator[Variant]:
    """Bytes changed here and there, in files as they are and in the pickles of archives whose checksums are right."""
    while True:
        for good in goods:
            at, value = chance.randrange(len(good.content)), chance.randrange(256)
            changed = replace(good.content, at, bytes([value]))
            verdict = EITHER if good.container == 'zip' else ONE_BYTE
            yield Variant(f'{good.container}: flip', f'{good.name}: byte {at} is {value}', changed, verdict)
            if good.container == 'zip':
                pickled = pickle_of(good.content)
                at = chance.randrange(len(pickled))
                changed = with_pickle(good, replace(pickled, at, bytes([value])))
                yield Variant('zip: forged pickle', f'{good.name}: pickle byte {at} is {value}', changed, AS_SAID)


def replace(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


# Any file


def bytes_changed(good: Good, chance: random.Random) -> Iterator[tuple]:
    content, size = good.content, len(good.content)
    checked = good.container == 'zip'
    for _ in range(20):
        at = chance.randrange(size)
        flipped = replace(content, at, bytes([content[at] ^ 1 << chance.randrange(8)]))
        yield 'flip', f'a bit of byte {at}', flipped, EITHER if checked else ONE_BYTE
    for length in (1, 64, 4096):
        at = chance.randrange(size - length)
        verdict = EITHER if checked else AS_SAID
        yield 'block', f'{length} zeros at {at}', replace(content, at, bytes(length)), verdict
        yield 'block', f'{length} random bytes at {at}', replace(content, at, chance.randbytes(length)), verdict
        yield 'block', f'{length} bytes cut out at {at}', content[:at] + content[at + length :], verdict
        yield 'block', f'{length} bytes put in at {at}', content[:at] + bytes(length) + content[at:], verdict
    yield 'block', 'bytes before it', b'MZ' + bytes(510) + content, EITHER
    yield 'block', 'bytes behind it', content + bytes(512), EITHER
    yield 'block', 'twice', content + content, EITHER
    for name, other in dict(
        nothing=b'', zeros=bytes(size), noise=chance.randbytes(size), text=b'hello\n' * 9, html=b'<!DOCTYPE html>',
        zip=b'PK\x03\x04', pickle=b'\x80', end=b'PK\x05\x06' + bytes(18), gzip=b'\x1f\x8b\x08' + bytes(99),
    ).items():  # fmt: skip
        yield 'something else', name, other, REFUSED


def truncations(good: Good, chance: random.Random) -> Iterator[tuple]:
    places = set(boundaries(good)) | {chance.randrange(len(good.content)) for _ in range(10)}
    for place in sorted(places):
        for length in (place - 1, place, place + 1):
            if 0 <= length < len(good.content):
                yield 'truncated', f'after {length} bytes', good.content[:length], REFUSED


def boundaries(good: Good) -> list[int]:
    """Where one part of the file ends and the next begins."""
    if good.container == 'safetensors':
        header = 8 + int.from_bytes(good.content[:8], 'little')
        entries = json.loads(good.content[8:header])
        offsets = [entry['data_offsets'][1] for name, entry in entries.items() if name != '__metadata__']
        return [8, header, *(header + offset for offset in offsets[:: len(offsets) // 6])]
    if good.container == 'legacy':
        ends, at = [], 0
        for _ in range(5):
            at = legacy_end(good.content, at)
            ends.append(at)
        return [*ends, ends[-1] + 8]
    with zipfile.ZipFile(io.BytesIO(good.content)) as archive:
        members = archive.infolist()
        central = archive.start_dir
    chosen = [*members[:3], *members[3 : -3 : len(members) // 4], *members[-3:]]
    starts = [member.header_offset for member in chosen]
    return [*starts, *(start + 30 for start in starts), central, central + 46, len(good.content) - 22]


@cache
def legacy_end(content: bytes, at: int) -> int:
    stream = io.BytesIO(content)
    stream.seek(at)
    for _ in pickletools.genops(stream):
        pass
    return stream.tell()


# Archives


@cache
def members_of(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def pack(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w', compression) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return stream.getvalue()


@cache
def pickle_of(content: bytes) -> bytes:
    return next(data for name, data in members_of(content) if name.endswith('/data.pkl'))


def with_pickle(good: Good, pickled: bytes) -> bytes:
    """The file with another pickle in the place of the one that holds its content, checksums made anew."""
    if good.container == 'legacy':
        start = legacy_end(good.content, legacy_end(good.content, legacy_end(good.content, 0)))
        return good.content[:start] + pickled + good.content[legacy_end(good.content, start) :]
    members = members_of(good.content)
    return pack([(name, pickled if name.endswith('/data.pkl') else data) for name, data in members])


CENTRAL = struct.Struct('<4s6H3I5H2I')
FIELDS = (
    'signature made needed flags method time date crc compressed size name extra comment disk internal external offset'
).split()


@cache
def central_entries(content: bytes) -> list[int]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        at, places = archive.start_dir, []
    while content[at : at + 4] == b'PK\x01\x02':
        places.append(at)
        fields = dict(zip(FIELDS, CENTRAL.unpack_from(content, at)))
        at += CENTRAL.size + fields['name'] + fields['extra'] + fields['comment']
    return places


def with_field(content: bytes, at: int, field: str, value: int) -> bytes:
    """A central directory entry with another value in a field."""
    values = dict(zip(FIELDS, CENTRAL.unpack_from(content, at)))
    return replace(content, at, CENTRAL.pack(*{**values, field: value}.values()))


def zips(good: Good, chance: random.Random) -> Iterator[tuple]:
    content = good.content
    members, entries = members_of(content), central_entries(content)
    names = [name for name, _ in members]
    root = names[0].split('/')[0]
    pickled = names.index(f'{root}/data.pkl')
    largest = max(range(len(members)), key=lambda index: len(members[index][1]))
    for target in (pickled, largest):
        name, data = members[target]
        for field in FIELDS[1:]:
            for value in (0, 1, 0x10, 0x7FFF, 0xFFFF):
                yield (
                    'field',
                    f'{field} of {name} is {value}',
                    with_field(content, entries[target], field, value),
                    EITHER,
                )
        for field in ('compressed', 'size', 'offset'):
            for value in (0xFFFFFFFF, 0xFFFFFFFE, 0x7FFFFFFF, len(content)):
                changed = with_field(content, entries[target], field, value)
                yield 'huge size', f'{field} of {name} is {value}', changed, REFUSED
        local = content.index(b'PK\x03\x04') if target == pickled else content.rindex(name.encode(), 0, entries[0]) - 30
        for at in range(30):
            flipped = replace(content, local + at, bytes([content[local + at] ^ 0xFF]))
            yield 'local header', f'byte {at} of {name}', flipped, EITHER
        yield 'duplicate', f'{name} twice', pack([*members, (name, data)]), REFUSED
        yield 'duplicate', f'{name} and another', pack([(name, bytes(len(data))), *members]), REFUSED
        yield 'missing', f'without {name}', pack([m for m in members if m[0] != name]), REFUSED
        yield 'record', f'{name} a byte longer', pack([(n, d + b'.' * (n == name)) for n, d in members]), EITHER
        yield (
            'record',
            f'{name} a byte shorter',
            pack([(n, d[: -1 if n == name else None]) for n, d in members]),
            REFUSED,
        )
        yield 'record', f'{name} empty', pack([(n, b'' if n == name else d) for n, d in members]), REFUSED
    end = len(content) - 22
    for at in range(22):
        flipped = replace(content, end + at, bytes([content[end + at] ^ 0xFF]))
        yield 'end record', f'byte {at}', flipped, EITHER
    for field, at in dict(entries=10, size=12, offset=16).items():
        for value in (0, 0xFFFF, 0xFFFFFFFF):
            packed = struct.pack(
                '<H' if field == 'entries' else '<I', value & (0xFFFF if field == 'entries' else value)
            )
            yield 'zip64', f'{field} of the end record is {value:#x}', replace(content, end + at, packed), EITHER
    for offset in (0, end, 2**32, 2**62):
        locator = struct.pack('<4sIQI', b'PK\x06\x07', 0, offset, 1)
        yield 'zip64', f'a locator to {offset}', content[:end] + locator + content[end:], EITHER
        record = struct.pack('<4sQ2H2I4Q', b'PK\x06\x06', 44, 45, 45, 0, 0, 2**60, 2**60, 2**60, offset)
        locator = struct.pack('<4sIQI', b'PK\x06\x07', 0, end, 1)
        yield 'zip64', f'a record that says {offset}', content[:end] + record + locator + content[end:], EITHER
    for name in (
        '../../canary',
        '/tmp/canary',
        'C:\\canary',
        f'{root}/../canary',
        f'{root}/data/../data/0',
        '',
        '\x00',
    ):
        yield 'traversing', f'a member {name!r} beside', pack([*members, (name, b'x')]), EITHER
        renamed = [(name if n == f'{root}/data/0' else n, d) for n, d in members]
        yield 'traversing', f'a tensor in {name!r}', pack(renamed), REFUSED
    for name in ('../data.pkl', '/data.pkl', 'other/data.pkl'):
        yield 'traversing', f'a second pickle in {name}', pack([(name, members[pickled][1]), *members]), REFUSED
    yield 'nested', 'an archive in the archive', pack([('checkpoint.pth', content)]), REFUSED
    yield 'nested', 'an archive for a pickle', pack([(f'{root}/data.pkl', content)]), REFUSED
    yield (
        'nested',
        'an archive for a tensor',
        pack([(n, content if n.endswith('/0') else d) for n, d in members]),
        REFUSED,
    )
    yield 'nested', 'an archive beside', pack([*members, (f'{root}/more.zip', content)]), EITHER
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        yield 'compressed', f'method {method}', pack(members, method), REFUSED
        bomb = [(n, bytes(300_000_000) if n.endswith('/0') else d) for n, d in members]
        if method == zipfile.ZIP_DEFLATED and good.name == '1.x':
            yield 'bomb', 'a tensor of 300 MB', pack(bomb, method), REFUSED
            bomb = [(n, b'\x80\x02' + b'}' * 300_000_000 if n.endswith('/data.pkl') else d) for n, d in members]
            yield 'bomb', 'a pickle of 300 MB', pack(bomb, method), REFUSED
            bomb = [*members, (f'{root}/more', bytes(300_000_000))]
            yield 'bomb', 'a member of 300 MB beside', pack(bomb, method), REFUSED
    size = CENTRAL.unpack_from(content, entries[largest])[9]
    for other in (entry for entry in entries if entry != entries[largest]):
        if CENTRAL.unpack_from(content, other)[9] > 1000 and chance.random() < 0.2:
            offset = CENTRAL.unpack_from(content, entries[largest])[16]
            changed = with_field(with_field(content, other, 'offset', offset), other, 'size', size)
            yield 'overlap', f'entry at {other}', with_field(changed, other, 'compressed', size), REFUSED
    for value in (b'big', b'middle', b'', b'little\n'):
        changed = [(n, value if n.endswith('/byteorder') else d) for n, d in members]
        yield 'record', f'byteorder {value!r}', pack(changed), REFUSED
    if good.name == '1.x':
        yield (
            'many',
            '100 000 members beside',
            pack([*members, *((f'{root}/{n}', b'') for n in range(100_000))]),
            EITHER,
        )
        yield 'many', 'a name of 65 000 characters', pack([*members, ('a' * 65000, b'')]), EITHER
    script = pack([*members, (f'{root}/constants.pkl', b'\x80\x02).'), (f'{root}/code/a.py', b'import os')])
    yield 'program', 'TorchScript', script, REFUSED


# Pickles: each is what the file holds, beside its tensors


def text(value: str) -> bytes:
    return (
        b'X' + struct.pack('<I', len(value.encode('utf-8', 'surrogatepass'))) + value.encode('utf-8', 'surrogatepass')
    )


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition('.')
    return f'c{module}\n{attribute}\n'.encode()


def number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
    return b'\x8a' + bytes([len(content)]) + content


def tuple_of(*parts: bytes) -> bytes:
    return b'(' + b''.join(parts) + b't'


def called(name: str, *arguments: bytes) -> bytes:
    return named(name) + tuple_of(*arguments) + b'R'


def dict_of(*items: tuple[bytes, bytes]) -> bytes:
    return b'}(' + b''.join(key + value for key, value in items) + b'u'


def pickled(value: bytes, protocol: int = 2) -> bytes:
    return b'\x80' + bytes([protocol]) + value + b'.'


def storage(key: str, elements: int, kind: str = 'torch.FloatStorage', more: bytes = b'') -> bytes:
    return tuple_of(text('storage'), named(kind), text(key), text('cpu'), number(elements), more) + b'Q'


def tensor(elements: int, offset: int, size: tuple, stride: tuple, **kwargs: object) -> bytes:
    return called(
        'torch._utils._rebuild_tensor_v2',
        storage('0', elements, **kwargs), number(offset), tuple_of(*map(number, size)), tuple_of(*map(number, stride)),
        b'\x89', called('collections.OrderedDict'),
    )  # fmt: skip


@cache
def numbered(count: int) -> bytes:
    return b'}(' + b''.join(text(f'stem.{n}') + b'N' for n in range(count)) + b'u'


CALLS = {
    'os.system': [text(f'touch {CANARY}')],
    'posix.system': [text(f'touch {CANARY}')],
    'nt.system': [text(f'touch {CANARY}')],
    'os.mkdir': [text(CANARY)],
    'os.execvp': [text('touch'), b'](' + text('touch') + text(CANARY) + b'e'],
    'os._exit': [number(0)],
    'sys.exit': [number(0)],
    'builtins.eval': [text(f'open({CANARY!r}, "w")')],
    'builtins.exec': [text(f'open({CANARY!r}, "w")')],
    '__builtin__.eval': [text(f'open({CANARY!r}, "w")')],
    'builtins.open': [text(CANARY), text('w')],
    'builtins.compile': [text('1'), text('x'), text('eval')],
    'builtins.__import__': [text('antigravity')],
    'builtins.getattr': [named('mmengine.logging.history_buffer.HistoryBuffer'), text('__init__')],
    'builtins.setattr': [named('torch.Size'), text('x'), number(1)],
    'builtins.print': [text('hello')],
    'builtins.input': [],
    'importlib.import_module': [text('this')],
    'runpy.run_path': [text('/etc/hostname')],
    'subprocess.Popen': [text(f'touch {CANARY}')],
    'subprocess.check_output': [text('id')],
    'pty.spawn': [text('sh')],
    'shutil.rmtree': [text('nowhere')],
    'socket.create_connection': [tuple_of(text('127.0.0.1'), number(9))],
    'urllib.request.urlopen': [text('http://127.0.0.1:9/')],
    'webbrowser.open': [text('http://127.0.0.1:9/')],
    'ctypes.CDLL': [text('libc.so.6')],
    'pickle.loads': [text('x')],
    'marshal.loads': [text('x')],
    'time.sleep': [number(3600)],
    'numpy.load': [text('x.npy')],
    'numpy.zeros': [number(10**12)],
    'torch.load': [text('x.pth')],
    'torch.hub.load': [text('a/b'), text('c')],
    'torch.jit.load': [text('x')],
    'torch.zeros': [number(10**12)],
    'torch.Tensor': [number(10**11)],
    'torch.FloatTensor': [number(10**11)],
    'torch.storage._load_from_bytes': [text('x')],
    'torch.utils.cpp_extension.load_inline': [text('x'), text('x')],
    'torch._utils._rebuild_tensor': [number(1)],
    'torch._utils._rebuild_meta_tensor_no_storage': [
        named('torch.float32'),
        tuple_of(number(2**62)),
        tuple_of(),
        b'\x89',
    ],
    'torch._tensor._rebuild_from_type_v2': [named('torch.Size'), named('torch.Tensor'), tuple_of(), dict_of()],
    'torch.serialization._get_layout': [text('torch.strided')],
    'mmengine.fileio.load': [text('x.pkl')],
    'mmengine.config.Config.fromfile': [text('x.py')],
    'mmengine.runner.Runner': [],
    'builtins.bytearray': [number(10**11)],
    'builtins.list': [text('x')],
    'builtins.range': [number(10**12)],
    'itertools.repeat': [number(1)],
    'builtins.complex': [number(1), number(1)],
    'builtins.int': [text('9' * 4000)],
    'collections.defaultdict': [named('os.getcwd')],
    'functools.partial': [named('os.system'), text('id')],
    'operator.attrgetter': [text('x')],
    'operator.methodcaller': [text('system'), text('id')],
    '_codecs.decode': [text('x'), text('rot13')],
    'pathlib.Path': [text(CANARY)],
    'builtins': [],
    'torch.nn.Linear': [number(10**6), number(10**6)],
    'HistoryBuffer': [],
}


def pickles(good: Good, chance: random.Random) -> Iterator[tuple]:
    # Tensors are made over the first storage, which has as many elements as the first tensor.
    first = next(iter(good.checkpoint.get('model', good.checkpoint.get('state_dict')).values()))
    for kind, name, content, verdict in _pickles(first.numel()):
        if good.name in ('0.x', 'before 1.6') or kind in ('calls', 'shapes', 'keys'):
            yield kind, name, with_pickle(good, content), verdict
    original = pickle_of(good.content) if good.container == 'zip' else None
    if original:
        for _ in range(20):
            at, value = chance.randrange(len(original)), chance.randrange(256)
            changed = with_pickle(good, replace(original, at, bytes([value])))
            yield 'forged pickle', f'pickle byte {at} is {value}', changed, AS_SAID
            yield 'pickle truncated', f'after {at} bytes', with_pickle(good, original[:at]), REFUSED
        yield 'pickle twice', 'one behind the other', with_pickle(good, original + original), EITHER
        # The payload stands before the good content, and its value is thrown away.
        evil = b'\x80\x02' + called('os.system', text(f'touch {CANARY}')) + b'0' + original[2:]
        yield 'calls', 'os.system before the content', with_pickle(good, evil), REFUSED


def _pickles(elements: int) -> Iterator[tuple]:
    weight, weights = text('backbone.stem.0.conv.weight'), text('state_dict')

    def checkpoint(value: bytes) -> bytes:
        return pickled(dict_of((weights, dict_of((weight, value)))))

    for name, arguments in CALLS.items():
        yield 'calls', name, checkpoint(called(name, *arguments)), REFUSED
        module, _, attribute = name.rpartition('.')
        old = f'(i{module}\n{attribute}\n'.encode()  # INST, of protocol 0
        yield 'calls', f'{name}, INST', checkpoint(old), REFUSED
        yield 'calls', f'{name}, OBJ', checkpoint(b'(' + named(name) + b''.join(arguments) + b'o'), REFUSED
        yield 'calls', f'{name}, NEWOBJ', checkpoint(named(name) + tuple_of(*arguments) + b'\x81'), REFUSED
        new = text(module) + text(attribute) + b'\x93' + tuple_of(*arguments) + b'R'
        yield 'calls', f'{name}, STACK_GLOBAL', pickled(dict_of((weights, new)), 4), REFUSED
    for name in (
        'collections.OrderedDict',
        'mmengine.logging.history_buffer.HistoryBuffer',
        'torch.Size',
        'numpy.ndarray',
    ):
        for state in (  # changed by BUILD
            dict_of((text('__class__'), named(name))),
            tuple_of(b'N', dict_of((text('__dict__'), dict_of()))),
            dict_of((text('_metadata'), number(1))),
            dict_of((text('max_length'), text('x'))),
            number(1),
        ):
            yield 'build', f'of the class {name}', checkpoint(named(name) + state + b'b'), REFUSED
            yield 'build', f'of a new {name}', checkpoint(named(name) + b')\x81' + state + b'b'), REFUSED
            yield 'build', f'of what {name} gives', checkpoint(named(name) + b')R' + state + b'b'), REFUSED
    yield 'imports', 'an extension code', checkpoint(b'\x82\x01'), REFUSED
    yield 'imports', 'a persistent id that is text', checkpoint(b'Pstorage\n'), REFUSED
    yield 'imports', 'an out-of-band buffer', checkpoint(b'\x97'), REFUSED
    for word in ('module', 'storage', 'x'):
        yield 'imports', f'a persistent {word}', checkpoint(tuple_of(text(word), named('os.system')) + b'Q'), REFUSED

    depth = 100_000
    for name, nested in {
        'a tuple': b')' + b'\x85' * depth,
        'lists': b']' * depth + b'a' * (depth - 1),
        'dicts': b'}' + (text('a') + b'}') * depth + b's' * depth,
        'parameters': named('torch._utils._rebuild_parameter') * depth + b'N' + b'NN\x87R' * depth,
        'marks': b'(' * 500_000 + b'N',
        'a list of itself': b']q\x00h\x00a',
        'doublings': b')' + b'q\x00h\x00\x86' * 60,
    }.items():
        yield 'recursion', f'{name} as a value', checkpoint(nested), REFUSED
        yield 'recursion', f'{name} as a key', pickled(b'}' + nested + b'Ns'), REFUSED
        yield 'recursion', f'{name} in a set', checkpoint(named('builtins.set') + b'](' + nested + b'e\x85R'), REFUSED
        yield 'recursion', f'{name} as a size', checkpoint(named('torch.Size') + nested + b'\x85R'), REFUSED
        yield 'recursion', f'{name} for weights', pickled(dict_of((weights, nested))), REFUSED
        pairs = named('collections.OrderedDict') + b'](](' + nested + b'Neee\x85R'
        yield 'recursion', f'{name} in pairs', checkpoint(pairs), REFUSED

    long = text('a' * MILLION)
    encode = named('_codecs.encode') + b'q\x01' + long + text('latin1') + b'\x86q\x02R'
    for name, greedy in {
        'a text of 4 GB': b'X\xff\xff\xff\xffabc',
        'a text of 2**63': b'\x8d' + b'\xff' * 7 + b'\x7fabc',
        'bytes of 4 GB': b'B\xff\xff\xff\xffabc',
        'a number of 2 GB': b'\x8b\xff\xff\xff\x7fabc',
        'a place of 2**32 in the memo': b'Nr\xff\xff\xff\xff',
        'a place that is not there': b'j\xff\xff\xff\x7f',
        'an empty dict a byte': b'(' + b'}' * 2 * MILLION + b't',
        'a list a byte': b'(' + b']' * 900_000 + b't',
        'the same bytes again and again': b'(' + encode + b'h\x01h\x02R' * 10_000 + b't',
        'an encoding that doubles': called('_codecs.encode', long, text('hex')),
        'an encoding that is slow': called('_codecs.encode', long, text('idna')),
        'an encoding in UTF-32': called('_codecs.encode', long, text('utf-32')),
        'a number of 10**6 digits': b'L' + b'9' * MILLION + b'L\n',
        'the same list in a tuple': b'](' + b'N' * 1000 + b'eq\x00(' + b'h\x00' * 100_000 + b't',
        'sets of the same list': b']('
        + b'N' * 1000
        + b'eq\x00('
        + (named('builtins.set') + b'h\x00\x85R') * 9999
        + b't',
    }.items():
        yield 'allocation', name, checkpoint(greedy), REFUSED

    one = tensor(elements, 0, (1,), (1,))
    for name, value in {
        'more elements than there are': tensor(10**12, 0, (10**12,), (1,)),
        'a negative number of them': tensor(-1, 0, (1,), (1,)),
        'elements of 2**63 bytes': tensor(2**61, 0, (1,), (1,)),
        'a size beyond the storage': tensor(elements, 0, (elements + 1,), (1,)),
        'an offset beyond the storage': tensor(elements, elements, (1,), (1,)),
        'an offset of 2**62': tensor(elements, 2**62, (1,), (1,)),
        'a negative offset': tensor(elements, -1, (1,), (1,)),
        'a negative stride': tensor(elements, 3, (4,), (-1,)),
        'a stride of 2**62': tensor(elements, 0, (4, 4), (2**62, 2**62)),
        'a stride of 0 and 10**12 elements': tensor(elements, 0, (10**12,), (0,)),
        'a stride of 0': tensor(elements, 0, (4, 2), (0, 1)),
        'strides that overlap': tensor(elements, 0, (2, 2), (1, 1)),
        'sizes whose product overflows': tensor(elements, 0, (2**33, 2**33), (0, 0)),
        'no elements in 2**62 rows': tensor(elements, 0, (2**62, 0), (1, 1)),
        'no elements in 2**80 rows': tensor(elements, 0, (2**80, 0), (1, 1)),
        '1000 dimensions': tensor(elements, 0, (1,) * 1000, (1,) * 1000),
        'fewer strides than dimensions': tensor(elements, 0, (2, 2), (1,)),
        'a size that is text': tensor(elements, 0, (), ()).replace(b'(t(t', b'(' + text('x') + b't(t'),
        'a storage that is not there': tensor(elements, 0, (1,), (1,)).replace(text('0'), text('../../etc/passwd')),
        'a storage with a key of 10**6 characters': one.replace(text('0'), text('9' * MILLION)),
        'a storage that is a number': tensor(elements, 0, (1,), (1,)).replace(text('0'), number(0)),
        'a storage of objects': tensor(elements, 0, (1,), (1,), kind='torch.ObjectStorage'),
        'a storage of complex numbers': tensor(elements, 0, (1,), (1,), kind='torch.ComplexFloatStorage'),
        'a storage of quantised numbers': tensor(elements, 0, (1,), (1,), kind='torch.QInt8Storage'),
        'a storage that is a view': tensor(elements, 0, (1,), (1,), more=tuple_of(text('0'), b'K\x00', number(9**9))),
        'a tensor without a storage': called('torch._utils._rebuild_tensor_v2', b'N', number(0), b'))', b'\x89N'),
        'an array of 10**12': called('numpy._core.multiarray._reconstruct', named('numpy.ndarray'), b'))')
        + tuple_of(number(1), tuple_of(number(10**12)), called('numpy.dtype', text('f8'), b'\x89\x88'), b'\x89' + long)
        + b'b',
        'an array of objects': called('numpy.dtype', text('O8'), b'\x89', b'\x88'),
        'an array of fields': called('numpy.dtype', text('f8,f8'), b'\x89', b'\x88'),
        'a scalar of objects': called('numpy._core.multiarray.scalar', text('O'), text('x')),
    }.items():  # fmt: skip
        yield 'shapes', name, checkpoint(value), REFUSED

    for name, key in {
        'a key of 10**6 characters': long,
        'a key of 10**6 digits': text('stages.0.blocks.' + '9' * MILLION + '.x'),
        'a key of 5000 digits': text('backbone.stages.0.blocks.' + '9' * 5000 + '.channel_mixer.2.conv.weight'),
        'a key of control characters': text('\x1b[2J\x1b]0;you\x07\r\n' * 99),
        'a key of half characters': text('\ud800' * 99),
        'a key without characters': text(''),
        'a key that is a number': number(7),
        'a key that is no number': b'G\x7f\xf8' + bytes(6),
        'a key that is None': b'N',
        'a key that is a tensor': tensor(elements, 0, (1,), (1,)),
        'a key that is a list': b']',
        'a key that is bytes': called('_codecs.encode', text('a'), text('latin1')),
        'a key of a distributed run of itself': text('module.' * 100_000),
    }.items():
        for what, value in dict(a_tensor=one, nothing=b'N').items():
            yield (
                'keys',
                f'{name}, {what}',
                pickled(dict_of((weights, dict_of((weight, one), (key, value))))),
                REFUSED,
            )
            yield (
                'keys',
                f'{name} beside the weights, {what}',
                pickled(dict_of((key, value), (weights, dict_of((weight, one))))),
                REFUSED,
            )
    for count in (100_000, 2 * MILLION):
        yield 'many keys', f'{count} keys', pickled(numbered(count)), REFUSED
    shared = one + b'q\x00'
    names = b''.join(text(f'stem.0.{n}') + b'h\x00' for n in range(200_000))
    yield 'many keys', '200 000 names of one tensor', pickled(b'}(' + text('stem.0') + shared + names + b'u'), REFUSED
    for name, value in {
        'nothing': b'', 'None': b'N', 'a list': b']', 'a number': number(1), 'text': text('x'), 'an empty dict': b'}',
        'two values': b'NN', 'no value': b'(',  'weights that are a list': dict_of((weights, b']')),
        'weights that are text': dict_of((weights, text('x'))), 'weights that are empty': dict_of((weights, b'}')),
        'weights in weights': dict_of((weights, dict_of((weights, dict_of((weight, one)))))),
        'a dtype': named('torch.float32'), 'a class': named('mmengine.logging.history_buffer.HistoryBuffer'),
    }.items():  # fmt: skip
        yield 'other content', name, pickled(value), REFUSED


# Tensors: the file is written by torch.save, with something else in it


def tensors(good: Good, chance: random.Random) -> Iterator[tuple]:
    place = 'model' if 'model' in good.checkpoint else 'state_dict'

    weights = good.checkpoint[place]

    def written(weights: dict, **kwargs: object) -> bytes:
        stream = io.BytesIO()
        content = {**good.checkpoint, place: weights}
        torch.save(content, stream, _use_new_zipfile_serialization=good.container == 'zip', **kwargs)
        return stream.getvalue()

    for key in chance.sample(
        [key for key, value in weights.items() if value.dim() == 4 and min(value.shape[:2]) > 1], 2
    ):
        original, others = weights[key], {name: weights[name] for name in weights if name != key}

        def become(change: Callable[[torch.Tensor], object], key: str = key) -> bytes:
            return written({**weights, key: change(weights[key])})

        for number in (float('nan'), float('inf'), float('-inf')):
            yield (
                'not finite',
                f'{number} in {key}',
                become(partial(torch.index_fill, dim=0, index=torch.tensor([1]), value=number)),
                REFUSED,
            )
        for dtype in (
            torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool,
            torch.complex64, torch.float8_e4m3fn,
        ):  # fmt: skip
            yield 'dtype', f'{key} as {dtype}', become(partial(torch.Tensor.to, dtype=dtype)), REFUSED
        for name, equal in {
            'channels last': lambda t: t.contiguous(memory_format=torch.channels_last),
            'transposed in memory': lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
            'every second number': lambda t: torch.stack([t, t], -1)[..., 0],
            'a part of something larger': lambda t: torch.cat([t, t])[len(t) :],
            'a parameter': torch.nn.Parameter,
        }.items():
            yield 'strides', f'{key}, {name}', become(equal), RIGHT
        for name, other in {
            'transposed': lambda t: t.transpose(0, 2) if t.shape[0] != t.shape[2] else t[None],
            'expanded from one number': lambda t: torch.zeros(1, 1, 1, 1).expand_as(t),
            'expanded over memory': lambda t: torch.zeros(t.numel()).as_strided(t.shape, (1, 0, 0, 0)),
            'windows that overlap': lambda t: torch.zeros(2 * t.numel()).as_strided(t.shape, (1, 1, 1, 1)),
            'one row more': lambda t: torch.cat([t, t[:1]]),
            'one row less': lambda t: t[1:],
            'no rows': lambda t: t[:0],
            'one number': lambda t: t.sum(),
            'flat': lambda t: t.flatten(),
            'quantised': lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
            'sparse': lambda t: t.to_sparse(),
            'meta': lambda t: t.to('meta'),
            'nested': lambda t: torch.nested.nested_tensor([t]),
            'in a list': lambda t: [t],
            'numpy': lambda t: t.numpy(),
            'text': lambda t: 'x',
            'None': lambda t: None,
        }.items():
            yield 'shape', f'{key}, {name}', become(other), REFUSED
        yield 'shape', f'{key} is missing', written(others), REFUSED
        yield 'shape', f'{key} twice', written({**weights, f'{key}_': original}), REFUSED
        yield 'shape', f'{key} in another place', written({**others, 'x': original}), REFUSED
    if good.container == 'zip':
        for protocol in (3, 4, 5):
            yield 'protocol', str(protocol), written(weights, pickle_protocol=protocol), EITHER
    yield 'rewritten', 'by torch.save', written(weights), RIGHT


def legacy(good: Good, chance: random.Random) -> Iterator[tuple]:
    content = good.content
    ends = [0]
    for _ in range(5):
        ends.append(legacy_end(content, ends[-1]))
    for index in range(5):
        for _ in range(8):
            at = chance.randrange(ends[index], ends[index + 1])
            value = chance.randrange(256)
            yield 'forged pickle', f'byte {at} is {value}', replace(content, at, bytes([value])), AS_SAID
        without = content[: ends[index]] + content[ends[index + 1] :]
        yield 'pickle missing', f'without pickle {index}', without, REFUSED
        doubled = content[: ends[index + 1]] + content[ends[index] :]
        yield 'pickle missing', f'pickle {index} twice', doubled, REFUSED
        evil = (
            content[: ends[index]] + pickled(called('os.system', text(f'touch {CANARY}'))) + content[ends[index + 1] :]
        )
        yield 'calls', f'os.system for pickle {index}', evil, REFUSED
    for value in (0, 1, 2**31, 2**62, 2**63 - 1, 2**64 - 1):
        changed = replace(content, ends[5], struct.pack('<Q', value))
        yield 'huge size', f'{value} elements', changed, REFUSED
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w') as archive:
        for name in ('sys_info', 'pickle', 'storages', 'tensors', '../../canary'):
            info = tarfile.TarInfo(name)
            info.size = ends[1]
            archive.addfile(info, io.BytesIO(content[: ends[1]]))
    yield 'tar', 'of PyTorch 0.1', stream.getvalue(), REFUSED


# safetensors


def safetensors(good: Good, chance: random.Random) -> Iterator[tuple]:
    size = int.from_bytes(good.content[:8], 'little')
    raw, data = good.content[8 : 8 + size], good.content[8 + size :]
    header = json.loads(raw)
    names = [name for name in header if name != '__metadata__']

    def packed(header: dict | bytes | str, data: bytes = data, length: int | None = None) -> bytes:
        if isinstance(header, dict):
            header = json.dumps(header)
        if isinstance(header, str):
            header = header.encode()
        return struct.pack('<Q', len(header) if length is None else length) + header + data

    for length in (0, 1, 2, size - 1, size + 1, size + len(data), 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1):
        yield 'header length', str(length), packed(raw, length=length), REFUSED
    for _ in range(60):
        at, value = chance.randrange(size), chance.randrange(256)
        yield 'header flip', f'byte {at} is {value}', packed(replace(raw, at, bytes([value]))), EITHER
    for name in chance.sample(names, 3):
        entry = header[name]
        start, end = entry['data_offsets']
        for offsets in (
            [end, start], [start, end + 4], [start + 4, end], [start, end - 4], [0, end - start], [start - 4, end - 4],
            [-1, end], [start, 2**63], [2**64, 2**65], [start, len(data) + 4], [0.5, end], [start], [start, end, end],
            ['0', '4'], None, [2**64 - 4, end],
        ):  # fmt: skip
            verdict = EITHER if offsets == [start, end] else REFUSED
            yield (
                'offsets',
                f'{name} at {offsets}',
                packed({**header, name: {**entry, 'data_offsets': offsets}}),
                verdict,
            )
        for dtype in ('F64', 'F16', 'BF16', 'I32', 'I64', 'U8', 'BOOL', 'C64', 'F8_E4M3', 'F4', 'X', '', None, 7):
            yield 'dtype', f'{name} as {dtype}', packed({**header, name: {**entry, 'dtype': dtype}}), REFUSED
        for shape in (
            [], [0], [-1], [2**32, 2**32], [2**63, 2], [2**64], [0, 2**62], [*entry['shape'], 1], [1] * 1000,
            [*entry['shape'][::-1], 2], 'x', None, [1.5], [*entry['shape'], 0],
        ):  # fmt: skip
            yield 'shape', f'{name} of {shape}'[:200], packed({**header, name: {**entry, 'shape': shape}}), REFUSED
        yield 'missing', name, packed({key: header[key] for key in header if key != name}), REFUSED
        other = next(other for other in names if header[other]['data_offsets'] != entry['data_offsets'])
        yield 'overlap', f'{name} and {other}', packed({**header, name: header[other]}), REFUSED
        twice = raw.decode()[:-1].rstrip() + ',' + json.dumps({name: entry})[1:]
        yield 'duplicate', f'{name} twice', packed(twice.rstrip()), EITHER
        twice = raw.decode()[:-1].rstrip() + ',' + json.dumps({name: header[other]})[1:]
        yield 'duplicate', f'{name} twice, differently', packed(twice.rstrip()), REFUSED
        yield 'unknown entry', name, packed({**header, name: {**entry, 'evil': 1}}), EITHER
        if end - start >= 4 and entry['dtype'] == 'F32':
            for value in (float('nan'), float('inf')):
                yield (
                    'not finite',
                    f'{value} in {name}',
                    packed(raw, replace(data, start, struct.pack('<f', value))),
                    REFUSED,
                )
    for name, content in {
        'deep lists': '[' * 100_000 + ']' * 100_000,
        'deep dicts': '{"a":' * 100_000 + '1' + '}' * 100_000,
        'deep metadata': '{"__metadata__":' + '{"a":' * 100_000 + '"1"' + '}' * 100_001,
        'an open bracket': '{',
        'a list': '[]',
        'an empty dict': '{}',
        'not UTF-8': b'{"\xff\xfe":1}',
        'a comment': '{} // hello',
        'two values': '{}{}',
        'a number of 10**6 digits': '{"a":' + '9' * MILLION + '}',
        'escapes': '{"' + '\\u0000' * 9999 + '":1}',
        'metadata that are numbers': json.dumps({**header, '__metadata__': {'a': 1}}),
    }.items():
        yield 'json', name, packed(content), REFUSED
    nothing = dict(dtype='F32', shape=[0], data_offsets=[0, 0])
    for count in (30_000, 300_000):
        yield 'many keys', f'{count} keys', packed({**header, **{f'stem.{n}': nothing for n in range(count)}}), REFUSED
    for name in ('a' * MILLION, 'stages.0.blocks.' + '9' * 5000 + '.x', '\x1b[2J\r\n', ''):
        yield 'keys', f'{name[:40]!r}', packed({**header, name: nothing}), REFUSED
    yield 'keys', 'metadata of 10**6 characters', packed({**header, '__metadata__': {'a': 'b' * MILLION}}), EITHER
    yield 'data', 'more than the header says', packed(raw, data + b'1234'), REFUSED
    yield 'data', 'less than the header says', packed(raw, data[:-4]), REFUSED
    yield 'data', 'none', packed(raw, b''), REFUSED
    yield 'data', 'spaces behind the header', packed(raw + b' ' * 800), RIGHT
    state = {name: torch.ones(2) for name in names}
    yield 'shape', 'other tensors', save(state), REFUSED
