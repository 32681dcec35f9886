"""Networks in other engines: the same logits and label maps, made once, and never trusted when they are read again."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.disks import small_disk_at
from helpers.reference import ROOT
from helpers.segmentors import deviation, pair, raw_images, recnext_cfg, sample_of, smooth_images, step
from helpers.tools import assert_user_error, run_tool, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from mmseg.registry import HOOKS
from torch import nn

from projects.recnext.recnext.cli.main import main
from projects.recnext.recnext.runtimes import cache as cache_module
from projects.recnext.recnext.runtimes import deployment as deploy_module
from projects.recnext.recnext.runtimes import network as network_module
from projects.recnext.recnext.runtimes.cache import Entry
from projects.recnext.recnext.runtimes.deployment import Deployment, deploy
from projects.recnext.recnext.runtimes.identity import digest, identify
from projects.recnext.recnext.runtimes.network import ENGINES, ConvertedNetwork
from projects.recnext.recnext.utils.errors import UserError

BOUND = 1e-5
"""Of a logit in single precision, relative to the largest one."""


def needs(engine: str) -> None:
    """Skip a test of an engine that is not here."""
    for package in ENGINES[engine].packages_for('fp32'):
        pytest.importorskip(package)
    try:
        ENGINES[engine].check('fp32')
    except UserError as error:  # no compiler
        pytest.skip(str(error))


@pytest.fixture(params=[pytest.param('compile', marks=pytest.mark.full), 'onnxruntime', 'openvino'])
def engine(request) -> str:
    needs(request.param)
    return request.param


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Of the cache."""
    monkeypatch.setattr(network_module, 'FOLDER', tmp_path / 'engines')
    return tmp_path / 'engines'


class Small(nn.Module):
    """Something from images to logits that is converted in a moment."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3, stride=4, padding=1)
        self.scale = 2.0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).relu() * self.scale


class Choosy(Small):
    """A graph of it holds for some sizes only, which torch.export may keep to itself."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) if images.shape[2] < 130 else super().forward(images) + 1


def converted(engine: str = 'onnxruntime', module: nn.Module | None = None) -> ConvertedNetwork:
    needs(engine)
    return ConvertedNetwork((module or Small()).eval(), engine, 'fp32')


def assert_right(network: ConvertedNetwork, images: torch.Tensor) -> torch.Tensor:
    found = network(images)
    with torch.no_grad():
        assert deviation(found, network.module(images)) < BOUND
    return found


def said_by(network: ConvertedNetwork, batches: Sequence[torch.Tensor], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is logged while images go through a network, rightly."""
    caplog.clear()
    with caplog.at_level('INFO', 'projects.recnext.recnext'):
        for images in batches:
            assert_right(network, images)
    return caplog.messages


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != '.lock')


def forbid_conversion(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    def convert(*_: object) -> None:
        raise AssertionError('converted again')

    monkeypatch.setattr(type(ENGINES[engine]), 'convert', convert)


def test_the_words_are_those_of_the_engines():
    assert set(deploy_module.ENGINES) == {'torch', 'compile', 'cudagraph', *ENGINES}


def test_what_was_converted_is_read_the_next_time(engine, folder, monkeypatch):
    first = converted(engine)
    found = [assert_right(first, smooth_images(number, size)) for number, size in ((1, (96, 128)), (3, (160, 96)))]
    assert len(entries(folder)) == 1
    forbid_conversion(monkeypatch, engine)
    second = converted(engine)
    # What is found is the caller's: the next call leaves it alone.
    for expected, (number, size) in zip(found, ((1, (96, 128)), (3, (160, 96)))):
        assert torch.equal(second(smooth_images(number, size)), expected)


# --- Sizes ---


def test_other_sizes_have_graphs_of_their_own(folder, monkeypatch, caplog):
    monkeypatch.setattr(network_module, 'MOST_SIZES', 2)
    network = converted()
    images = [
        smooth_images(1, size) for size in ((50, 70), (64, 64), (20, 20), (30, 20), (96, 96), (20, 20), (128, 96))
    ]
    said = said_by(network, images, caplog)
    assert len(entries(folder)) == 3, 'two of one size, one of any'
    assert sum('others run in PyTorch' in line for line in said) == 1


def test_a_network_that_cannot_take_all_sizes_at_once(folder, monkeypatch):
    network = converted(module=Choosy())
    assert_right(network, smooth_images(1, (96, 96)))
    assert_right(network, smooth_images(1, (160, 96)))
    assert (1, 3, 160, 96) in network._graphs
    forbid_conversion(monkeypatch, 'onnxruntime')
    assert_right(network, smooth_images(1, (160, 96), seed=1))


# --- The cache ---


def test_what_decides_the_result_is_in_the_name(monkeypatch):
    same = digest(identify(Small(), engine='a'))
    assert same == digest(identify(Small().to(memory_format=torch.channels_last), engine='a'))
    changed = Small()
    with torch.no_grad():
        changed.conv.weight[0, 0, 0, 0] += 1e-6
    strided, scaled = Small(), Small()
    strided.conv.stride, scaled.scale = (2, 2), 3.0
    others = [changed, strided, scaled, Small().bfloat16(), Choosy()]
    names = {digest(identify(module, engine='a')) for module in others}
    assert len(names) == len(others) and same not in names
    assert digest(identify(Small(), engine='b')) != same
    monkeypatch.setattr(torch, '__version__', '0.1')
    assert digest(identify(Small(), engine='a')) != same


MADE_OF = dict(weights='0', packages='onnxruntime 1.0')


@pytest.fixture
def entry(tmp_path) -> Entry:
    """That has been made."""
    (tmp_path / 'made').mkdir()
    (tmp_path / 'made' / 'network.onnx').write_bytes(bytes(range(256)))
    entry = Entry(tmp_path / 'engines' / 'a', MADE_OF)
    assert not entry.is_whole() and entry.keep(tmp_path / 'made') and entry.is_whole()
    return entry


def _flip(folder: Path) -> None:
    file = folder / 'network.onnx'
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def _of_another_version(folder: Path) -> None:
    record = json.loads((folder / 'entry.json').read_text())
    record['made_of']['packages'] = 'onnxruntime 0.1'
    (folder / 'entry.json').write_text(json.dumps(record))


def _in_the_way(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b'something else')


def _elsewhere(folder: Path) -> None:
    shutil.move(folder, folder.with_name('b'))
    folder.symlink_to('b')
    _flip(folder)


SPOIL = [
    _flip,
    _of_another_version,
    _in_the_way,
    _elsewhere,
    shutil.rmtree,
    lambda folder: os.truncate(folder / 'network.onnx', 255),
    lambda folder: (folder / 'network.onnx').unlink(),
    lambda folder: (folder / 'entry.json').unlink(),
    lambda folder: (folder / 'entry.json').write_text('[]'),
    lambda folder: (folder / 'entry.json').write_text('{"made_of"'),
    lambda folder: (folder / 'entry.json').write_text(json.dumps(dict(made_of=MADE_OF, files={}))),
    lambda folder: (folder / 'entry.json').write_text(json.dumps(dict(made_of=MADE_OF, files={'x/': 1}))),
    lambda folder: (folder / 'entry.json').write_bytes(bytes(range(256))),
]


@pytest.mark.parametrize('spoil', SPOIL)
def test_a_spoiled_entry_counts_as_none_and_is_replaced(entry, tmp_path, spoil):
    spoil(entry.folder)
    assert not entry.is_whole()
    assert entry.keep(tmp_path / 'made') and entry.is_whole()
    assert not [path for path in entry.folder.parent.iterdir() if path.name.startswith('.')]


def test_what_was_not_used_for_long_makes_way(tmp_path, monkeypatch):
    made = tmp_path / 'made'
    made.mkdir()
    (made / 'network.onnx').write_bytes(bytes(1000))
    kept = [Entry(tmp_path / 'engines' / name, dict(name=name)) for name in 'abc']
    for age, entry in enumerate(kept):
        assert entry.keep(made)
        os.utime(entry.folder / 'entry.json', times=(age, age))
    kept[0].note_use()
    monkeypatch.setattr(cache_module, 'MOST_BYTES', 4000)
    newest = Entry(tmp_path / 'engines' / 'd', dict(name='d'))
    assert newest.keep(made)
    assert [entry.is_whole() for entry in [*kept, newest]] == [True, False, True, True]
    monkeypatch.setattr(cache_module, 'MOST_BYTES', 10)  # one that is larger than all is kept alone
    assert kept[1].keep(made)
    assert entries(tmp_path / 'engines') == [kept[1].folder]


def test_a_spoiled_network_is_made_anew(folder, monkeypatch):
    converted()(smooth_images(1))
    (place,) = entries(folder)
    _flip(place)
    assert_right(converted(), smooth_images(1))
    forbid_conversion(monkeypatch, 'onnxruntime')
    assert_right(converted(), smooth_images(1))
    assert entries(folder) == [place]


def test_a_disk_that_is_full(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(network_module, 'FOLDER', tmp_path / 'disk' / 'engines')
    with small_disk_at(tmp_path / 'disk', 2**16):
        (tmp_path / 'disk' / 'other').write_bytes(bytes(2**16))
        network = converted()
        said = said_by(network, 2 * [smooth_images(1)], caplog)
        assert sum('not kept' in line and 'the disk is full' in line for line in said) == 1
        assert entries(tmp_path / 'disk' / 'engines') == []


@pytest.mark.parametrize('where', ['engines', 'engines/inside'])
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog, where):
    """As on a read-only file system; permissions do not hold for root, and so a file stands in the folder's place."""
    (tmp_path / 'engines').write_text('a file')
    monkeypatch.setattr(network_module, 'FOLDER', tmp_path / where)
    said = said_by(converted(), 2 * [smooth_images(1)], caplog)
    assert sum('not kept' in line for line in said) == 1
    assert (tmp_path / 'engines').read_text() == 'a file'


SMALL = """
import sys, torch
from projects.recnext.recnext.runtimes.network import ENGINES, ConvertedNetwork
torch.manual_seed(0)
kind, made = type(ENGINES[sys.argv[1]]), []
convert = kind.convert
kind.convert = lambda *args: (made.append(1), convert(*args))
network = ConvertedNetwork(torch.nn.Conv2d(3, 4, 3).eval(), sys.argv[1], 'fp32')
print(len(network(torch.ones(1, 3, 96, 96))), len(made))
"""


@pytest.mark.full
@pytest.mark.parametrize('engine', ['compile', 'onnxruntime'], indirect=True)
def test_three_processes_make_it_once(engine, tmp_path):
    env = {**os.environ, 'XDG_CACHE_HOME': str(tmp_path)}
    options = dict(cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    processes = [subprocess.Popen([sys.executable, '-c', SMALL, engine], **options) for _ in range(3)]
    said = [process.communicate()[0].splitlines()[-1] for process in processes]
    assert sorted(said) == ['1 0', '1 0', '1 1']
    assert len(entries(tmp_path / 'recnext' / 'engines')) == 1


@pytest.mark.parametrize(
    'after', [pytest.param(False, marks=pytest.mark.full), True], ids=['before it is converted', 'and after']
)
def test_an_interrupted_conversion_leaves_nothing(folder, monkeypatch, after):
    needs('onnxruntime')
    convert = type(ENGINES['onnxruntime']).convert

    def interrupted(*args: object) -> None:
        if after:
            convert(*args)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(type(ENGINES['onnxruntime']), 'convert', interrupted)
            converted()(smooth_images(1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert entries(folder) == []
    assert_right(converted(), smooth_images(1))
    assert len(entries(folder)) == 1


# --- What is refused ---


@pytest.mark.parametrize(
    ('wrong', 'found'),
    [(lambda logits: logits * 1.001, '1.0e-03'), (lambda logits: logits[:, :2], 'inf'), (lambda x: x / 0, 'inf')],
)
def test_logits_that_are_not_those_of_pytorch(folder, monkeypatch, wrong, found):
    module = Small()
    monkeypatch.setattr(type(ENGINES['onnxruntime']), 'convert', lambda *_: None)
    monkeypatch.setattr(type(ENGINES['onnxruntime']), 'open', lambda *_: lambda images: wrong(module(images)))
    with pytest.raises(UserError, match=f'other logits than PyTorch: they differ by {found}.*Nothing was kept'):
        converted()(smooth_images(1))
    assert entries(folder) == []


def test_an_engine_that_fails(folder, monkeypatch):
    def convert(*_: object) -> None:
        raise RuntimeError('no such operation\nand more')

    monkeypatch.setattr(type(ENGINES['onnxruntime']), 'convert', convert)
    with pytest.raises(UserError, match='cannot convert this network: RuntimeError: no such operation\n'):
        converted()(smooth_images(1))
    assert entries(folder) == []


@pytest.mark.parametrize(
    ('absent', 'form', 'message'),
    [
        ('openvino', dict(engine='openvino'), r'pip install openvino\n.*\[openvino\]'),
        ('onnxruntime', dict(engine='onnxruntime'), r'pip install onnxruntime\n.*\[onnx\]'),
        ('onnxscript', dict(engine='onnxruntime'), 'pip install onnxscript'),
    ],
)
def test_an_engine_that_is_not_installed(monkeypatch, absent, form, message):
    monkeypatch.setattr(
        'importlib.util.find_spec', lambda name, *args: None if name == absent else find_spec(name, *args) or True
    )
    with pytest.raises(UserError, match=message):
        Deployment(**form)


def test_no_compiler(tiny, scenes, tmp_path):
    environment = dict(os.environ, CXX='no-compiler')
    image = min((scenes / 'images' / 'validation').iterdir())
    args = ('--out-dir', tmp_path / 'out', '--device', 'cpu', '--compile')
    result = run_tool('infer', *tiny, image, *args, fresh=True, env=environment)
    assert_user_error(result, 'compile needs a C++ compiler, and finds none here', '--engine torch')


@pytest.mark.parametrize(
    ('form', 'message'),
    [
        (dict(engine='tensorrt'), 'expected one of torch, compile, cudagraph, openvino, onnxruntime'),
        (dict(engine='onnxruntime', precision='bf16'), 'onnxruntime computes in fp32; found precision bf16'),
        (dict(engine='openvino', precision='fp16'), 'openvino computes in fp32 or bf16'),
    ],
)
def test_words_that_do_not_go_together(form, message):
    with pytest.raises(UserError, match=message):
        Deployment(**form)


def test_bfloat16_without_instructions_for_it():
    openvino = pytest.importorskip('openvino')
    if 'BF16' in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        assert str(Deployment(engine='openvino', precision='bf16')) == 'bf16, folded: all, openvino'
    else:
        with pytest.raises(UserError, match='this one has none'):
            Deployment(engine='openvino', precision='bf16')


OPENED_AND_CLOSED = """
import gc, os, signal, sys
from pathlib import Path
import torch
from projects.recnext.recnext.runtimes.onnx import write_network
from projects.recnext.recnext.runtimes.openvino import OpenVinoEngine

write_network(torch.export.export(torch.nn.Conv2d(3, 4, 3).eval(), (torch.rand(1, 3, 8, 8),)), Path())
signal.signal(signal.SIGUSR1, lambda *_: print('handled'))
networks = [OpenVinoEngine().open(Path(), 'fp32') for _ in range(3)]
while networks:
    del networks[0]
    gc.collect()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_after_networks_of_openvino_are_closed(tmp_path):
    """In the order in which they were opened, as when an engine is chosen anew: it left signals no stack to run on."""
    needs('openvino')
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, '-c', OPENED_AND_CLOSED]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, 'handled\n'), result.stderr


COMPILED = """
import torch
from projects.recnext.recnext.runtimes.network import ConvertedNetwork
ConvertedNetwork(torch.nn.Conv2d(3, 4, 3).eval(), 'compile', 'fp32')(torch.ones(1, 3, 96, 96))
"""


@pytest.mark.full
def test_the_compiler_is_interrupted(tmp_path):
    """By Ctrl-C, while it compiles: neither an entry nor what was compiled so far is left."""
    needs('compile')
    scratch = tmp_path / 'tmp'
    scratch.mkdir()
    environment = dict(os.environ, XDG_CACHE_HOME=str(tmp_path / 'cache'), TMPDIR=str(scratch))
    command = [sys.executable, '-c', COMPILED]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: list(scratch.glob('*/*/*/*.wrapper.cpp')) or process.poll() is not None, minutes=10)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode and 'KeyboardInterrupt' in said
    assert entries(tmp_path / 'cache' / 'recnext' / 'engines') == []
    assert list(scratch.iterdir()) == []


# --- Segmentors ---


@pytest.fixture(scope='module')
def of_segmentors(tmp_path_factory) -> Callable:
    """Pairs of the same segmentor in PyTorch and in an engine, each made once."""
    folder = tmp_path_factory.mktemp('engines')

    @cache
    def make(engine: str, seed: int, mode: str = 'whole') -> tuple[nn.Module, nn.Module]:
        needs(engine)
        networks = []
        for form in (Deployment(), Deployment(('all', 'norms')[seed % 2], engine=engine)):
            model = pair(recnext_cfg(classes=(7, 19)[seed % 2], mode=mode), seed=seed)[1]
            deploy(model, form)
            networks.append(model)
        networks[1].forward_logits.folder = folder
        return tuple(networks)

    return make


def assert_same_labels(predictions: tuple, bound: float = BOUND) -> None:
    """Label maps are equal, but where PyTorch's own scores are as close as logits may differ."""
    ours, theirs = predictions
    scores = ours.seg_logits.data
    found = theirs.pred_sem_seg.data
    behind = scores.max(0).values - scores.gather(0, found)[0]
    assert (behind <= 2 * bound * scores.abs().max()).all()
    assert (found == ours.pred_sem_seg.data).float().mean() > 0.999


@pytest.mark.full
@pytest.mark.parametrize(('engine', 'networks'), [('compile', 2), ('onnxruntime', 8), ('openvino', 8)])
def test_label_maps_are_those_of_pytorch(of_segmentors, engine, networks):
    """200 batches of images over some networks; each network is converted once, and to compile it takes minutes."""

    @settings(max_examples=200)
    @given(
        seed=st.integers(0, networks - 1),
        number=st.integers(1, 3),
        blocks=st.tuples(st.integers(3, 8), st.integers(3, 8)),
        images=st.integers(0, 2**20),
    )
    def check(seed: int, number: int, blocks: tuple[int, int], images: int) -> None:
        size = tuple(32 * side for side in blocks)
        samples = [sample_of(size, ori_shape=(size[0] - 7, size[1] + 9)) for _ in range(number)]
        found = [step(model, raw_images([size] * number, images), samples) for model in of_segmentors(engine, seed)]
        for predictions in zip(*found):
            assert_same_labels(predictions)

    check()


@pytest.mark.full
@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_slide_and_sizes_together(of_segmentors, engine):
    sizes = [(64, 96), (64, 96), (100, 70)]
    found = [
        step(model, raw_images(sizes), [sample_of(size) for size in sizes])
        for model in of_segmentors(engine, 0, 'slide')
    ]
    for predictions in zip(*found):
        assert_same_labels(predictions)


def test_the_hook_of_configs(folder):
    needs('onnxruntime')
    model = pair(recnext_cfg())[1]
    runner = SimpleNamespace(model=model, logger=logging.getLogger('test_network'))
    HOOKS.build(dict(type='DeployHook', engine='onnxruntime')).before_test(runner)
    assert isinstance(model.forward_logits, ConvertedNetwork)
    HOOKS.build(dict(type='DeployHook')).before_test(runner)
    assert 'network' not in vars(model)


def test_the_compiler_on_another_device(monkeypatch):
    """PyTorch compiles there while it runs."""
    monkeypatch.setattr(torch, 'compile', lambda network: ('compiled', network))
    model = pair(recnext_cfg())[1].to('meta')
    deploy(model, Deployment(engine='compile'))
    assert model.forward_logits[0] == 'compiled'


def test_what_is_compiled_knows_its_form(folder):
    """The order in memory and the precision decide the program."""
    needs('compile')
    names = set()
    for form in (dict(), dict(channels_last=False), dict(precision='bf16')):
        model = pair(recnext_cfg())[1]
        deploy(model, Deployment(engine='compile', **form))
        names.add(digest(model.forward_logits.made_of))
    assert len(names) == 3


@pytest.mark.full
def test_bfloat16_is_compiled(folder):
    needs('compile')
    model = pair(recnext_cfg())[1]
    deploy(model, Deployment(engine='compile', precision='bf16'))
    logits = model.forward_logits(smooth_images(1))  # compared with PyTorch's
    assert logits.dtype == torch.float32 and len(entries(folder)) == 1


def test_an_engine_of_the_processor_on_another_device(folder):
    needs('onnxruntime')
    with pytest.raises(UserError, match='--device cpu'):
        deploy(pair(recnext_cfg())[1].to('meta'), Deployment('none', engine='onnxruntime'))


# --- The tools ---


def test_a_tool_with_an_engine(folder, tiny, tmp_path, scenes):
    needs('onnxruntime')
    image, outputs = min((scenes / 'images' / 'validation').iterdir()), []
    for engine in ('torch', 'onnxruntime'):
        out = tmp_path / engine
        main(['predict', *map(str, (*tiny, image)), '--out-dir', str(out), '--engine', engine, '--fuse', 'norms'])
        outputs.append([path.read_bytes() for path in sorted(out.rglob('*.png'))])
    assert outputs[0] == outputs[1] and outputs[0]
    assert len(entries(folder)) == 1


def test_two_words_for_an_engine(tiny, capsys):
    with pytest.raises(SystemExit, match='2'):
        main(['test', *map(str, tiny), '--compile', '--engine', 'openvino'])
    assert 'not allowed with' in capsys.readouterr().err
    assert_user_error(run_tool('test', *tiny, '--engine', 'onnxruntime', '--precision', 'bf16'), 'computes in fp32')
