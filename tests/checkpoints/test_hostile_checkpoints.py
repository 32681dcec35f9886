"""Files from strangers: each is loaded to exactly the right weights or refused with one clear error, and does no harm.

The whole corpus: python -m pytest tests/checkpoints/test_hostile_checkpoints.py --full -s
"""

import ast
import collections
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import hostile_checkpoints as hostile
import pytest
import torch
from helpers.networks import randomise_norms
from helpers.reference import ROOT
from helpers.tiny import write_tiny_config
from hostile_checkpoints import AS_SAID, CANARY, ONE_BYTE, REFUSED, RIGHT, Good, make_variants
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from rich.console import Console
from rich.table import Table

from projects.recnext.recnext.checkpoints.files import write_checkpoint, write_safetensors
from projects.recnext.recnext.checkpoints.keys import convert_state_dict
from projects.recnext.recnext.openmmlab.builder import build_without_weights
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.errors import UserError

SECONDS = 60
"""After which a reader counts as hung."""

TIMES, MEGABYTES = 3, 256
"""A reader takes at most so many times the size of the file and so many MB more."""

LINES, CHARACTERS = 15, 2000
"""Of the longest error."""


@pytest.fixture(scope='module')
def tiny(tmp_path_factory) -> tuple[Path, dict]:
    """A config, and the weights of its network in mmseg 1.x form."""
    folder = tmp_path_factory.mktemp('tiny')
    extra = """
arch.update(channels=(4, 8, 16, 32))
model.update(neck=dict(in_channels=[4, 8, 16, 32], out_channels=4), decode_head=dict(in_channels=[4] * 4, channels=4))
"""
    config = write_tiny_config(folder, Path('data'), extra)
    torch.manual_seed(0)
    segmentor = build_without_weights(Config.fromfile(config).model)
    randomise_norms(segmentor)
    return config, dict(segmentor.state_dict())


@pytest.fixture(scope='module')
def goods(full, tiny, tmp_path_factory) -> list[Good]:
    """A good checkpoint of each layout and each container."""
    folder, weights = tmp_path_factory.mktemp('goods'), tiny[1]
    legacy = convert_state_dict(weights, 'legacy').state_dict
    backbone = {key.removeprefix('backbone.'): value for key, value in legacy.items() if key.startswith('backbone.')}
    head = {
        f'head.{branch}.{name}': torch.rand(shape)
        for branch in ('head', 'head_dist')
        for name, shape in {'norm.weight': 32, 'norm.bias': 32, 'linear.weight': (9, 32), 'linear.bias': 9}.items()
    }
    meta = dict(CLASSES=('wall', 'sky'), PALETTE=[[1, 2, 3], [4, 5, 6]], epoch=1, iter=2, config='a = 1')
    log = HistoryBuffer([1.0, 2.0], [1, 1])
    optimizer = dict(
        state={0: dict(step=torch.tensor(2.0), exp_avg=torch.rand(3))}, param_groups=[dict(betas=(0.9, 1.0))]
    )
    new = dict(meta=dict(iter=2), state_dict=weights, message_hub=dict(log_scalars=dict(loss=log)), optimizer=optimizer)
    old = dict(meta=meta, state_dict=legacy)
    write_checkpoint(old, folder / '0.x')
    write_checkpoint(new, folder / '1.x')
    write_checkpoint(dict(model={**backbone, **head}), folder / 'ImageNet')
    torch.save(old, folder / 'before 1.6', _use_new_zipfile_serialization=False)
    write_safetensors({**backbone, **head}, folder / 'hub', {})
    held = {
        '0.x': ('zip', old),
        '1.x': ('zip', new),
        'ImageNet': ('zip', dict(model={**backbone, **head})),
        'before 1.6': ('legacy', old),
        'hub': ('safetensors', {**backbone, **head}),
    }
    chosen = held if full else ('0.x', 'before 1.6', 'hub')  # one for each container
    return [Good(name, (folder / name).read_bytes(), *held[name]) for name in chosen]


class Reader:
    """A process that reads one file after the other, started again when it ends or hangs."""

    def __init__(self, good: Path, room: Path) -> None:
        self.good, self.room, self.process = good, room, None

    def read(self, name: str, path: Path) -> dict:
        """What became of a file."""
        if self.process is None:
            command = [sys.executable, ROOT / 'tests' / 'weights' / 'hostile_reader.py', self.good]
            environment = dict(os.environ, OMP_NUM_THREADS='1')
            self.process = subprocess.Popen(
                command, cwd=self.room, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            assert json.loads(self.process.stdout.readline())['ready']
        self.process.stdin.write(json.dumps([name, str(path)]) + '\n')
        self.process.stdin.flush()
        hung = threading.Timer(SECONDS, self.process.kill)
        hung.start()
        line = self.process.stdout.readline()
        hung.cancel()
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.process = None
        return dict(outcome=f'ended with {code}, or hung', seconds=SECONDS, memory=0, seen=[])

    def close(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait()


class Tried(NamedTuple):
    """A variant without its bytes, and what became of it."""

    kind: str
    name: str
    verdict: str
    size: int
    result: dict


def complaint(variant: Tried) -> str | None:
    """What is wrong with what became of a file; None if nothing is."""
    result = variant.result
    outcome, message = result['outcome'], result.get('message', '')
    if outcome not in ('loaded', 'refused'):
        return f'{outcome}: {message}'
    if result['seen']:
        return f'did {result["seen"]}'
    if result['memory'] > TIMES * variant.size + MEGABYTES * 1e6:
        return f'took {result["memory"] / 1e6:.0f} MB for {variant.size} bytes'
    if outcome == 'refused':
        wrong = len(message.splitlines()) > LINES or len(message) > CHARACTERS
        wrong = wrong or any(not (character.isprintable() or character == '\n') for character in message)
        if wrong or variant.verdict == RIGHT:
            return f'refused: {message[:2000]!r}'
        return None
    allowed = {REFUSED: False, AS_SAID: result.get('as_said', True), ONE_BYTE: result['bytes'] <= 1}
    if not allowed.get(variant.verdict, result['bytes'] == 0):
        return f'loaded, {result["bytes"]} bytes are others'
    return None


def test_every_variant_is_right_or_refused_and_does_no_harm(full, goods, tmp_path):
    good, room, path = tmp_path / 'good', tmp_path / 'room', tmp_path / 'variant'
    good.mkdir()
    room.mkdir()
    for file in goods:
        (good / f'{file.name}.good').write_bytes(file.content)
    reader, tried, number = Reader(good, room), [], 4500 if full else 30
    for kind, name, content, verdict in make_variants(goods, number):
        path.write_bytes(content)
        result = reader.read(name.split(': ')[0], path)
        tried.append(Tried(kind, name, verdict, len(content), result))
    reader.close()
    print_table(tried)
    wrong = [f'{row.kind}: {row.name}: {found}' for row in tried if (found := complaint(row))]
    assert not wrong, '\n'.join([f'{len(wrong)} of {len(tried)}:', *wrong[:40]])
    assert list(room.iterdir()) == [] and {path.name for path in tmp_path.iterdir()} == {'good', 'room', 'variant'}
    assert not Path('/tmp', CANARY).exists()
    assert len({row.kind for row in tried}) > (70 if full else 60) and len(tried) >= number


def print_table(tried: list[Tried]) -> None:
    groups = collections.defaultdict(list)
    for row in tried:
        groups[row.kind].append(row)
    table = Table('kind', title='Files from strangers')
    for heading in ('tried', 'refused', 'loaded', 'slowest, s CPU', 'most memory, MB', 'of a file of, MB'):
        table.add_column(heading, justify='right')
    for kind, rows in [*sorted(groups.items()), ('all', tried)]:
        outcomes = collections.Counter(row.result['outcome'] for row in rows)
        most = max(rows, key=lambda row: row.result['memory'])
        table.add_row(
            kind, *map(str, (len(rows), outcomes['refused'], outcomes['loaded'])),
            f'{max(row.result["seconds"] for row in rows):.2f}',
            f'{most.result["memory"] / 1e6:.0f}', f'{most.size / 1e6:.1f}',
        )  # fmt: skip
    Console(width=120).print(table)


# One reader


READING = {
    'load', 'load_file', 'safe_open', 'loads', 'Unpickler', 'load_url', 'load_state_dict_from_url', 'load_checkpoint',
    'torch_load',
}  # fmt: skip
OWNERS = {'torch', 'torch.hub', 'torch.jit', 'torch.serialization', 'pickle', 'cPickle', 'dill', 'joblib', 'marshal'}
READERS = {'checkpoint.py', 'torch_format.py'}


def reading_calls(source: str) -> list[str]:
    """What a module calls or imports that reads checkpoints or pickles, or loads weights without being strict."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name in OWNERS - {'torch'}]
        elif isinstance(node, ast.ImportFrom) and node.module:
            owner = node.module in OWNERS or node.module.split('.')[0] in ('safetensors', 'pickle')
            found += [f'{node.module}.{name.name}' for name in node.names if owner and name.name in READING]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            owner, _, function = name.rpartition('.')
            arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if function in READING and (owner in OWNERS or 'safetensors' in owner):
                found.append(name)
            if function == 'load_state_dict' and (arguments.get('strict', 'True') != 'True' or len(node.args) > 1):
                found.append(ast.unparse(node))
            if arguments.get('weights_only', 'True') != 'True' or arguments.get('allow_pickle', 'False') != 'False':
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    'source',
    [
        'import torch\ntorch.load("x", weights_only=True)', 'from torch import load', 'import pickle',
        'from safetensors.torch import load_file', 'model.load_state_dict(state, strict=False)',
        'model.load_state_dict(state, False)', 'np.load("x", allow_pickle=True)', 'torch.hub.load("a", "b")',
    ],
)  # fmt: skip
def test_other_readers_would_be_noticed(source):
    assert reading_calls(source)


def test_there_is_one_reader():
    modules = [*(ROOT / 'projects').rglob('*.py'), *(ROOT / 'tools').rglob('*.py')]
    found = {path.name: calls for path in modules if (calls := reading_calls(path.read_text()))}
    assert len(modules) > 70 and set(found) <= READERS, found
    assert found['torch_format.py'] == ['pickle', 'torch.load']
    assert found['checkpoint.py'] == ['pickle', 'safetensors.torch.load_file']


def test_mmengine_reads_by_it_too(goods, tmp_path, monkeypatch):
    from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint

    evil = tmp_path / 'evil.pth'
    evil.write_bytes(hostile.with_pickle(goods[0], hostile.pickled(hostile.called('os.getcwd'))))
    with pytest.raises(UserError, match=r'refused: it wants to run os\.getcwd'):
        load_checkpoint(torch.nn.Linear(1, 1), str(evil), map_location='cpu')
    for address in ('pavi://a', 's3://a/b', 'petrel://a', 'cluster:s3://a'):
        with pytest.raises(UserError, match='Download it'):
            CheckpointLoader.load_checkpoint(address)
    # The rest look up an address and go by load_from_http, which compat.py replaces (see test_compat.py).
    others = {loader.__name__ for loader in CheckpointLoader._schemes.values() if 'mmengine' in loader.__module__}
    assert others == {'load_from_torchvision', 'load_from_openmmlab', 'load_from_mmcls'}


TOOLS = {
    'convert_checkpoint': ['{evil}', 'out.pth'],
    'test': ['{config}', '{evil}', '--data-root', '{data}', '--work-dir', 'out'],
    'train': ['{config}', '--data-root', '{data}', '--work-dir', 'out', '--cfg-options', 'load_from={evil}'],
    'infer': ['{config}', '{evil}', '{data}/images', '--out-dir', 'out'],
    'export_onnx': ['{config}', '{evil}', '--out', 'out.onnx'],
    'export_coreml': ['{config}', '{evil}', '--out', 'out.mlpackage'],
    'export_web': ['{config}', '{evil}', '--out', 'out'],
    'web_demo': ['{config}', '{evil}'],
    'serve': ['{config}', '{evil}'],
    'push_to_hub': ['{config}', '{evil}', 'user/name'],
    'benchmark': ['{config}', '{evil}', '--data-root', '{data}', '--work-dir', 'out'],
    'benchmark_export': ['{config}', '{evil}'],
    'benchmark_gpu': ['{config}', '{evil}', '--data-root', '{data}', '--work-dir', 'out', '--tiny', '--device', 'cpu'],
}
"""Every tool that takes a checkpoint, with one."""

IN_ONE_PROCESS = """
import json, runpy, sys
for tool, *arguments in json.loads(sys.argv[1]):
    print(f'--- {tool}', file=sys.stderr)
    sys.argv = [tool, *arguments]
    try:
        runpy.run_path(tool, run_name='__main__')
    except SystemExit as error:
        print(f'exits with {error.code}', file=sys.stderr)
"""


def test_every_tool_refuses_a_stranger(tiny, goods, tmp_path):
    tools = {path.stem for path in (ROOT / 'tools').glob('[a-z]*.py')}
    without = {
        'download_checkpoint',
        'benchmark_training',
        'update_model_zoo',
        'make_sample_dataset',
        'report',
        'check_dataset',
        # These ask for their packages first, and read by the same steps as the other exports.
        'export_executorch',
        'export_litert',
    }
    assert tools - without == set(TOOLS)
    evil, data, room = tmp_path / 'evil.pth', tmp_path / 'data', tmp_path / 'room'
    evil.write_bytes(hostile.with_pickle(goods[1], hostile.pickled(hostile.called('os.system', hostile.text('id')))))
    write_dataset(data, training=2, validation=1)
    room.mkdir()
    places = dict(evil=evil, config=tiny[0], data=data)
    commands = [
        [str(ROOT / 'tools' / f'{tool}.py'), *(argument.format(**places) for argument in TOOLS[tool])] for tool in TOOLS
    ]
    command = [sys.executable, '-c', IN_ONE_PROCESS, json.dumps(commands)]
    environment = dict(os.environ, PYTHONPATH=str(ROOT / 'tools'))
    result = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True)
    sections = result.stderr.split('--- ')[1:]
    assert len(sections) == len(TOOLS), result.stderr
    for section in sections:
        assert f'exits with error: {evil} is refused: it wants to run os.system' in section.replace('\n', ' '), section
        assert 'Traceback' not in section
    assert list(room.iterdir()) == []
