"""Files from strangers: nothing in them is executed, and what cannot be read is one sentence."""

import io
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.malicious import Command
from helpers.reference import ROOT
from helpers.tools import assert_user_error, run_tool
from mmengine.logging import HistoryBuffer
from safetensors.torch import save

from projects.recnext.recnext.checkpoints.convert import convert_file
from projects.recnext.recnext.checkpoints.files import CheckpointError, read_checkpoint
from projects.recnext.recnext.checkpoints.keys import ConversionError, check_weights_fit, get_state_dict
from projects.recnext.recnext.utils.errors import UserError

TENSORS = {'a': torch.arange(600.0).reshape(20, 30), 'b': torch.arange(6)}


class Attribute:
    """A pickle that asks for an attribute of something that is allowed."""

    def __init__(self, owner: object, name: str) -> None:
        self.reached = owner, name

    def __reduce__(self):
        return getattr, self.reached


class Call:
    """A pickle that calls something harmless-looking with arguments of its own."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


SYSTEM, TOUCH = b'posix\nsystem\n', b"S'touch canary'\n"
OPCODES = {
    'REDUCE': b'c' + SYSTEM + b'(' + TOUCH + b'tR',
    'INST': b'(' + TOUCH + b'i' + SYSTEM,
    'OBJ': b'(c' + SYSTEM + TOUCH + b'o',
    'NEWOBJ': b'c' + SYSTEM + b'(' + TOUCH + b't\x81',
    'STACK_GLOBAL': b'\x8c\x05posix\x8c\x06system\x93(' + TOUCH + b'tR',
    'BUILD': b'cbuiltins\nset\n)R(' + TOUCH + b'tb',
    'a persistent id': b'Pcanary\n',
    'an extension': b'\x82\x01',
}
"""Ways of a pickle to have something run; each leaves one object on the stack."""

WITHIN = {
    'a value': lambda evil: dict(TENSORS, evil=evil),
    'a list of dicts': lambda evil: dict(TENSORS, evil=[(1, dict(x=[evil]))]),
    'the only thing': lambda evil: evil,
    'behind the weights of a wrapper': lambda evil: dict(state_dict=TENSORS, optimizer=dict(state={0: evil})),
}


@pytest.fixture
def room(tmp_path, monkeypatch) -> Path:
    """A working directory, in which a payload would leave ``canary``."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def zipped(pickled: bytes) -> bytes:
    """PyTorch's archive with this pickle in the place of its content."""
    stream, made = io.BytesIO(), io.BytesIO()
    torch.save(TENSORS, stream)
    with zipfile.ZipFile(stream) as good, zipfile.ZipFile(made, 'w') as other:
        for name in good.namelist():
            other.writestr(name, pickled if name.endswith('/data.pkl') else good.read(name))
    return made.getvalue()


@pytest.mark.parametrize('container', ['zip', 'pickle'])
@pytest.mark.parametrize('opcode', OPCODES)
def test_no_opcode_of_a_pickle_runs_anything(room, opcode, container):
    pickled = b'\x80\x02}X\x01\x00\x00\x00a' + OPCODES[opcode] + b's.'
    Path('evil.pth').write_bytes(zipped(pickled) if container == 'zip' else pickled)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint('evil.pth')
    assert os.listdir() == ['evil.pth'] and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('kind', ['zip', 'before torch 1.6', 'pickle 2', 'pickle 4'])
@pytest.mark.parametrize('where', WITHIN)
def test_payloads_are_refused_by_name_wherever_they_are(room, where, kind):
    content = WITHIN[where](Command(Path('canary')))
    if kind.startswith('pickle'):
        Path('evil.pth').write_bytes(pickle.dumps(content, protocol=int(kind[-1])))
    else:
        torch.save(content, 'evil.pth', _use_new_zipfile_serialization=kind == 'zip')
    with pytest.raises(CheckpointError) as error:
        read_checkpoint('evil.pth')
    # A bare pickle is no file of PyTorch's: it is refused for its first word that torch.save would not write.
    wanted = '' if kind.startswith('pickle') else 'posix.system'
    assert str(error.value).startswith(f'evil.pth is refused: it wants to run {wanted}')
    assert os.listdir() == ['evil.pth']


@pytest.mark.parametrize(
    'evil',
    [
        Call(Path.touch, Path('canary')),
        Call(eval, "open('canary', 'w')"),
        Attribute(HistoryBuffer, '__init__'),
        Attribute(HistoryBuffer, 'statistics'),
        Attribute(torch.Tensor, 'numpy'),
    ],
)
def test_what_is_allowed_reaches_no_further(room, evil):
    torch.save(dict(TENSORS, evil=evil), 'evil.pth')
    with pytest.raises(CheckpointError, match='refused: it wants to run'):
        read_checkpoint('evil.pth')
    assert os.listdir() == ['evil.pth']


WATCHED = """
import os, sys
import torch
from projects.recnext.recnext.checkpoints.files import read_checkpoint
from projects.recnext.recnext.utils.errors import UserError

seen, names = [], os.listdir()
def read_all():
    for name in names:
        try:
            read_checkpoint(name)
        except UserError:
            pass
read_all()  # what is imported and compiled once
on = True
def note(event, arguments):
    if on and event.startswith(('exec', 'compile', 'os.system', 'os.posix_spawn', 'subprocess', 'socket', 'import')):
        seen.append(f'{event} {arguments!r}'[:200])
sys.addaudithook(note)
read_all()
on = False
print(seen)
"""


def test_an_audit_hook_sees_no_code_no_process_and_no_connection(room):
    for name, opcode in OPCODES.items():
        Path(name).write_bytes(zipped(b'\x80\x02}X\x01\x00\x00\x00a' + opcode + b's.'))
    for name, make in WITHIN.items():
        torch.save(make(Command(Path('canary'))), name)
    names, environment = sorted(os.listdir()), dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, '-c', WATCHED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout == '[]\n', result.stderr
    assert sorted(os.listdir()) == names


def test_torchscript_is_not_loaded(room):
    torch.jit.script(torch.nn.Linear(1, 1)).save('script.pt')
    with pytest.raises(CheckpointError, match='TorchScript'):
        read_checkpoint('script.pt')


def test_an_archive_that_unpacks_without_end_is_refused(room):
    torch.save(dict(state_dict=dict(a=torch.zeros(10**7))), 'stored.pth')
    with zipfile.ZipFile('stored.pth') as stored, zipfile.ZipFile('bomb.pth', 'w', zipfile.ZIP_DEFLATED) as bomb:
        for entry in stored.infolist():
            bomb.writestr(entry.filename, stored.read(entry))
    assert torch.load('bomb.pth', weights_only=True)  # PyTorch unpacks it
    with pytest.raises(CheckpointError, match='would unpack to 40 MB'):
        read_checkpoint('bomb.pth')


def test_strings_stay_plain_data_and_are_not_passed_on(room, released):
    """mmengine would execute ``meta['config']``, and read configs and pickles that a string names."""
    text = "x = __import__('os').system('touch canary')"
    content = read_checkpoint(released('recnext_m0_distill_300e'))
    meta = dict(config=text, cfg=text, CLASSES=(text, 'b'), exp_name='evil.yml', epoch=3)
    torch.save({**content, 'meta': meta, 'hook_msgs': {'load': text}}, 'a.pth')
    assert read_checkpoint('a.pth')['meta'] == meta
    convert_file('a.pth', 'b.pth')
    written = read_checkpoint('b.pth')
    assert written.keys() == {'meta', 'state_dict'} and written['meta'].keys() == {'dataset_meta', 'epoch', 'source'}
    assert sorted(os.listdir()) == ['a.pth', 'b.pth']


# Damage


def good_files() -> dict[str, bytes]:
    """A checkpoint in each container."""
    files = {'safetensors': save(TENSORS)}
    for name, new in (('zip', True), ('before torch 1.6', False)):
        stream = io.BytesIO()
        torch.save(dict(state_dict=TENSORS, meta=dict(epoch=1)), stream, _use_new_zipfile_serialization=new)
        files[name] = stream.getvalue()
    return files


GOOD = good_files()


@pytest.mark.parametrize('container', GOOD)
def test_truncated_files_are_one_sentence(room, container):
    content = GOOD[container]
    for length in {1, 8, 9, 16, 64, len(content) - 1, *random.Random(0).sample(range(len(content)), 40)}:
        Path('cut').write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r'cut is (truncated or damaged|not a checkpoint|refused)') as error:
            read_checkpoint('cut')
        assert len(str(error.value).splitlines()) == 1, length


@pytest.mark.parametrize('container', GOOD)
def test_damaged_files_are_one_sentence_or_still_weights(room, full, container):
    """Checksums are not compared: a number may be another, but nothing ends in another error than ours."""
    content, chance = GOOD[container], random.Random(0)
    refused, tries = 0, 1000 if full else 150
    for _ in range(tries):
        changed, index = bytearray(content), chance.randrange(len(content))
        changed[index : index + chance.choice((1, 1, 8))] = chance.randbytes(chance.choice((0, 1, 8)))
        Path('damaged').write_bytes(changed)
        try:
            assert isinstance(read_checkpoint('damaged'), dict)
        except CheckpointError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000 and str(error).isprintable()
    assert 0 < refused < tries


@pytest.mark.parametrize(
    ('make', 'words'),
    [
        (lambda p: None, 'No such checkpoint'),
        (lambda p: p.mkdir(), 'is a folder'),
        (lambda p: p.write_bytes(b''), r'empty \(0 bytes\)'),
        (lambda p: p.write_text('version https://git-lfs'), 'not a checkpoint.*version https'),
        (lambda p: p.write_text('<!DOCTYPE html>'), 'not a checkpoint'),
        (lambda p: p.write_bytes(b'PK\x05\x06' + bytes(18)), 'not a checkpoint'),
        (lambda p: p.write_bytes(b'\xff' * 8 + b'{'), 'truncated or damaged'),
        (lambda p: torch.save([1, 2], p), 'expected a dict, found list'),
    ],
    ids=['missing', 'folder', 'empty', 'text', 'page', 'empty archive', 'endless header', 'list'],
)
def test_other_things_are_named(tmp_path, make, words):
    make(tmp_path / 'it')
    with pytest.raises(CheckpointError, match=words) as error:
        read_checkpoint(tmp_path / 'it')
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_numbers_that_are_none_are_refused(number):
    weights = dict(TENSORS, a=TENSORS['a'].index_fill(1, torch.tensor([7]), number))
    with pytest.raises(ConversionError, match='numbers of a: found NaN or infinity'):
        check_weights_fit(weights, TENSORS, 'it')


def test_names_of_a_file_are_printed_on_one_line(room):
    name = 'a\x1b[2J\n' + 'b' * 10**5
    with pytest.raises(UserError) as error:
        check_weights_fit({name: torch.ones(1)}, {}, 'it')
    said = str(error.value)
    assert len(said.splitlines()) == 2 and len(said) < 300 and '\x1b' not in said
    with pytest.raises(UserError) as error:
        get_state_dict({name: 3})
    assert len(str(error.value)) < 300 and '\x1b' not in str(error.value)


# One reader


OTHER_READERS = re.compile(
    r'torch\.load\(|\bpickle\.loads?\(|Unpickler|load_url|load_state_dict_from_url|\bjit\.load\(|hub\.load|joblib|marshal'
    r'|weights_only=False|allow_pickle=True|load_file\(|safe_open\(|add_safe_globals\(|load_state_dict\(.*strict=False'
)


def test_there_is_one_reader():
    modules = [*(ROOT / 'projects').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')]
    found = {f'{path.parent.name}/{path.name}': OTHER_READERS.findall(path.read_text()) for path in modules}
    assert len(modules) > 70
    assert {name: calls for name, calls in found.items() if calls} == {
        'checkpoints/files.py': ['load_file(', 'torch.load('],
        'openmmlab/compat.py': ['add_safe_globals('],  # for mmseg's own tools
    }


TOOLS = {
    'convert_checkpoint': ['{evil}', 'out.pth'],
    'test': ['{config}', '{evil}', '--data-root', '{data}', '--work-dir', 'out'],
    'train': ['{config}', '--data-root', '{data}', '--work-dir', 'out', '--cfg-options', 'load_from={evil}'],
    'infer': ['{config}', '{evil}', '{data}/images', '--out-dir', 'out'],
}


@pytest.mark.parametrize('tool', TOOLS)
def test_tools_refuse_a_stranger(tiny, scenes, tmp_path, tool):
    evil, room = tmp_path / 'evil.pth', tmp_path / 'room'
    torch.save(dict(state_dict=TENSORS, evil=Command(Path('canary'))), evil)
    room.mkdir()
    arguments = [argument.format(evil=evil, config=tiny[0], data=scenes) for argument in TOOLS[tool]]
    assert_user_error(run_tool(tool, *arguments, cwd=room), f'{evil} is refused: it wants to run posix.system')
    assert list(room.iterdir()) == []
