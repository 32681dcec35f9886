"""Devices by their words, and what is measured on them: of any kind, most of which only pretend to be here."""

import platform

import pytest
import torch
from helpers.devices import pretend
from mmengine.config import Config
from mmengine.device import get_device
from torch import distributed

from projects.recnext.recnext.cli.doctor import list_accelerators
from projects.recnext.recnext.cli.main import build_parser
from projects.recnext.recnext.openmmlab.distributed import backend_of, check_own_device, prepare_processes
from projects.recnext.recnext.openmmlab.runner import run_on
from projects.recnext.recnext.openmmlab.test import TestOptions
from projects.recnext.recnext.openmmlab.test import test as run_test
from projects.recnext.recnext.predict.model import load_deployed
from projects.recnext.recnext.utils.devices import describe_device, find_device, lacks_half_precision
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.utils.images import ImageError
from projects.recnext.recnext.utils.memory import can_tell_peak, peak_memory, reset_peak
from projects.recnext.recnext.utils.timing import Stopwatch

KINDS = ('cuda', 'mps', 'xpu')


@pytest.mark.parametrize(
    ('device', 'machine', 'capability', 'lacks'),
    [
        ('cpu', 'x86_64', 'AVX2', True),
        ('cpu', 'AMD64', 'DEFAULT', True),
        ('cpu', 'x86_64', 'AVX512', False),
        ('cpu', 'arm64', 'DEFAULT', False),
        ('meta', 'x86_64', 'AVX2', False),
    ],
)
def test_processors_without_instructions_for_16_bits(monkeypatch, device, machine, capability, lacks):
    monkeypatch.setattr(platform, 'machine', lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    assert lacks_half_precision(torch.device(device)) == lacks


@pytest.fixture
def no_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    ('count', 'word', 'process', 'expected'),
    [
        (1, 'auto', 0, '{}'),
        (1, 'auto', 3, '{}'),
        (1, '{}', 0, '{}'),
        (1, '{}:0', 0, '{}:0'),
        (2, 'auto', 0, '{}:0'),
        (2, 'auto', 3, '{}:1'),
        (2, '{}', 1, '{}:1'),
        (2, '{}:1', 0, '{}:1'),
        (2, '{}:1', 1, '{}:1'),
        (2, 'cpu', 1, 'cpu'),
    ],
)
def test_words(monkeypatch, kind, count, word, process, expected):
    pretend(monkeypatch, kind, count)
    assert find_device(word.format(kind), process) == torch.device(expected.format(kind))
    assert find_device(torch.device(expected.format(kind)), process) == torch.device(expected.format(kind)) or count > 1


@pytest.mark.usefixtures('no_accelerator')
@pytest.mark.parametrize('word', ['auto', 'cpu', 'cpu:0'])
def test_words_without_an_accelerator(word):
    assert find_device(word, 5) == torch.device('cpu')


@pytest.mark.parametrize(
    ('word', 'message'),
    [
        ('gpu', "'gpu' is no device; expected auto, cpu, cuda"),
        ('', "'' is no device"),
        ('cuda:x', "'cuda:x' is no device"),
        ('cuda', 'finds no cuda here; there is xpu, and cpu'),
        ('mps:0', 'finds no mps here'),
        ('meta', 'finds no meta here'),
        ('xpu:2', 'xpu:2: there are 2 of this kind, and the first is xpu:0'),
    ],
)
def test_words_of_no_device(monkeypatch, word, message):
    pretend(monkeypatch, 'xpu', 2)
    with pytest.raises(UserError, match=message):
        find_device(word)


@pytest.mark.usefixtures('no_accelerator')
@pytest.mark.parametrize('word', ['cuda', 'cuda:0', 'mps', 'xpu'])
def test_the_message_without_an_accelerator(word):
    with pytest.raises(UserError, match=rf'{word}: torch .* finds no \w+ here; there is cpu\.'):
        find_device(word)


@pytest.mark.parametrize('kind', KINDS)
def test_the_stopwatch_reads_the_clock_of_the_device(monkeypatch, kind):
    clock = pretend(monkeypatch, kind, 2)
    device = torch.device(kind, 1)
    stopwatch = Stopwatch(device)

    def work(milliseconds):
        clock.milliseconds += milliseconds

    for milliseconds in (3, 4):
        stopwatch.timed('work', work)(milliseconds)
    ((start, _), _) = stopwatch.spans['work']
    assert start.at[1] == f'stream of {device}' and not clock.asked  # nothing waits for an image
    assert stopwatch.read() == dict(work=0.007) and clock.asked == [('synchronize', device)]
    assert stopwatch.read() == {}


@pytest.mark.parametrize('kind', ['cuda', 'xpu'])
def test_peaks_of_a_device_that_tells(monkeypatch, kind):
    peaks = {}
    pretend(
        monkeypatch, kind, 2,
        reset_peak_memory_stats=lambda device: peaks.update({device: 2**20}),
        max_memory_allocated=lambda device: peaks[device],
    )  # fmt: skip
    device = torch.device(kind, 1)
    assert can_tell_peak(device) and reset_peak(device) == 1
    peaks[device] = 5 * 2**20
    assert peak_memory(device) == 5


def test_peaks_of_a_device_that_does_not(monkeypatch):
    pretend(monkeypatch, 'mps')
    assert not can_tell_peak(torch.device('mps'))


def test_names(monkeypatch):
    assert describe_device(torch.device('cpu')) == 'CPU'
    pretend(monkeypatch, 'mps')
    assert describe_device(torch.device('mps')) == 'MPS'
    pretend(monkeypatch, 'xpu', 2, get_device_name=lambda device: f'Arc {device.index}')
    assert describe_device(torch.device('xpu:1')) == 'Arc 1'
    assert {'xpu:0: Arc 0', 'xpu:1: Arc 1'} <= set(list_accelerators())


@pytest.mark.parametrize('kind', [*KINDS, 'cpu'])
def test_a_runner_is_told_the_device(monkeypatch, kind):
    clock, before = pretend(monkeypatch, kind, 2), get_device()
    device = torch.device(kind, 1) if kind != 'cpu' else torch.device('cpu')
    with pytest.raises(KeyError), run_on(device):
        assert get_device() == kind
        assert clock.asked == ([] if kind == 'cpu' else [('set_device', 1)])
        raise KeyError
    assert get_device() == before


@pytest.mark.parametrize(
    ('device', 'joined_by', 'syncs'),
    [('cpu', 'gloo', False), ('mps', 'gloo', False), ('xpu:1', 'cpu:gloo,xpu:xccl', True)],
)
def test_processes_talk_through_what_the_device_has(monkeypatch, device, joined_by, syncs):
    for name in ('RANK', 'LOCAL_RANK'):
        monkeypatch.setenv(name, '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    joined = []
    pretend(monkeypatch, torch.device(device).type, 2)
    monkeypatch.setattr(distributed, 'init_process_group', joined.append)
    cfg = Config(dict(launcher='pytorch', sync_bn='torch'))
    prepare_processes(cfg, torch.device(device))
    assert joined == [joined_by] and cfg.model_wrapper_cfg.device_ids is None
    assert cfg.sync_bn == ('torch' if syncs else None)
    assert backend_of(torch.device('cuda')) == 'nccl'
    # mmengine joins these itself, one GPU a process.
    prepare_processes(cfg, torch.device('cuda:1'))
    with pytest.raises(UserError, match=r'Process 1 .* cuda:0.*expected --device cuda\.'):
        prepare_processes(cfg, torch.device('cuda:0'))
    assert len(joined) == 1


@pytest.mark.parametrize(('count', 'device'), [(1, 'cuda'), (2, 'cuda:1')])
def test_more_processes_than_accelerators_are_refused(monkeypatch, count, device):
    """As find_device deals them out; mmengine would ask CUDA for one that is not there."""
    pretend(monkeypatch, 'cuda', count)
    assert find_device('auto', process=3) == torch.device(device)
    with pytest.raises(UserError, match=rf'found {count} of kind cuda for at least 4 processes') as error:
        check_own_device(torch.device(device), 3)
    assert '--device' not in str(error.value)
    check_own_device(find_device('auto', process=count - 1), count - 1)


def test_the_commands_take_a_device():
    parser = build_parser()
    for arguments in ('predict a b c', 'test a b', 'web a b', 'benchmark a', 'benchmark-training a'):
        assert parser.parse_args(arguments.split()).device == 'auto'
        assert parser.parse_args([*arguments.split(), '--device', 'cuda:1']).device == 'cuda:1'


@pytest.mark.usefixtures('no_accelerator')
def test_an_absent_device_is_said_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(UserError, match='finds no xpu here'):
        run_test(*map(str, tiny), TestOptions(work_dir=str(tmp_path / 'work'), device='xpu'))
    assert not (tmp_path / 'work').exists()
    with pytest.raises(UserError, match='finds no mps here'):
        load_deployed(*tiny, device='mps')


@pytest.mark.parametrize(
    ('error', 'caught'),
    [
        (torch.OutOfMemoryError('CUDA'), ImageError),
        (RuntimeError('MPS backend out of memory (MPS allocated: 9 GB)'), ImageError),
        (RuntimeError('shapes do not match'), RuntimeError),
    ],
)
def test_too_little_memory_is_said_whatever_the_device(tiny, monkeypatch, error, caught):
    model = load_deployed(*tiny, device='cpu')

    def fail(data):
        raise error

    monkeypatch.setattr(model.network, 'test_step', fail)
    image = torch.zeros(40, 50, 3, dtype=torch.uint8).numpy()
    with pytest.raises(caught) as raised:
        model(image)
    assert type(raised.value) is caught and ('too little memory' in str(raised.value)) == (caught is ImageError)
