"""Shared fixtures: the reference files beside the repository, small checkpoints, and the tools as a user runs them."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from playwright.sync_api import Browser, sync_playwright
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / 'shared'
sys.path.insert(0, str(ROOT))

import projects.recnext.recnext  # noqa: E402, F401  (registers, as every tool does)
from projects.recnext.recnext.archs import ARCHS  # noqa: E402
from projects.recnext.recnext.paths import CONFIGS  # noqa: E402

ARCH_NAMES = tuple(ARCHS)
SEGMENTORS = ('m3', 'm4', 'm5', 'a3', 'a4', 'a5')
ADE20K_CONFIGS = sorted(CONFIGS.glob('fpn_recnext-*_ade20k-*.py'))
SEGMENTOR_CONFIGS = sorted(CONFIGS.glob('fpn_*.py'))
CLASSIFIER_CONFIGS = sorted(CONFIGS.glob('recnext-*.py'))

# Under pytest-xdist two processes share the two cores.
torch.set_num_threads(1 if 'PYTEST_XDIST_WORKER' in os.environ else 2)
init_default_scope('mmseg')  # as a config does


LOCAL = ('127.0.0.1', 'localhost', '::1', '0.0.0.0', '::', '', None)


def stay_on_this_machine(event: str, arguments: tuple) -> None:
    """An audit hook that ends what would look up or reach another machine."""
    if event == 'socket.connect' and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event in ('socket.getaddrinfo', 'socket.gethostbyname'):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    # .invalid is nobody's, by RFC 2606.
    if host not in (*LOCAL, socket.gethostname()) and not host.endswith('.invalid'):
        raise PermissionError(f'tests connect to this machine alone, and not to {host}')


sys.addaudithook(stay_on_this_machine)


def shared(path: str) -> Path:
    """A reference file that is not part of the repository; the test is skipped, with its name, where it is absent."""
    place = SHARED / path
    if not place.exists():
        pytest.skip(f'needs ../shared/{path}, which is not there')
    return place


def config_of(arch: str) -> Path:
    return next(path for path in ADE20K_CONFIGS if f'recnext-{arch}_' in path.name)


def run_tool(name: str, *args: object, **kwargs: object) -> subprocess.CompletedProcess:
    """Run a command line of ``tools/`` in a process of its own."""
    command = [sys.executable, ROOT / 'tools' / f'{name}.py', *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, **kwargs)


def assert_user_error(result: subprocess.CompletedProcess, *words: str) -> None:
    """A few lines that name the problem, no traceback, exit code 1."""
    assert result.returncode == 1, result.stderr
    assert 'Traceback' not in result.stderr
    message = result.stderr[result.stderr.index('error: ') :]
    assert len(message.splitlines()) <= 15, message
    for word in words:
        assert word in message, message


def descendants(ancestor: int) -> list[int]:
    """Processes under ``ancestor``, children before grandchildren."""
    listing = subprocess.run(['ps', '-eo', 'pid=,ppid=,stat='], capture_output=True, text=True).stdout.splitlines()
    rows = [(int(pid), int(parent)) for pid, parent, state in map(str.split, listing) if 'Z' not in state]
    found = [ancestor]
    for process in found:
        found += [pid for pid, parent in rows if parent == process]
    return found[1:]


@pytest.fixture(scope='session')
def formula_weights() -> Callable[[dict], dict]:
    """``fill(layout)`` of ../shared/legacy: the weights that the golden outputs were computed with."""
    path = shared('legacy/formula_weights.py')
    spec = importlib.util.spec_from_file_location('formula_weights', path)
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fill


@pytest.fixture(scope='session')
def real_m3() -> Path:
    """A checkpoint written by the genuine mmseg 0.30 stack."""
    return shared('legacy/real_m3/recnext_m3_ade20k_sample3.pth')


@pytest.fixture(scope='session')
def ade20k_sample() -> Path:
    """Three real images of ADE20K with annotations."""
    return shared('ade20k_sample/ADEChallengeData2016')


def read_layout(name: str) -> dict:
    """Keys, shapes and dtypes of a released checkpoint."""
    return json.loads(shared(f'legacy/layouts/{name}.json').read_text())


@pytest.fixture(scope='session')
def released(tmp_path_factory, formula_weights) -> Callable[[str], Path]:
    """Stand-ins for released files, made on demand."""
    folder = tmp_path_factory.mktemp('released')

    def make(name: str) -> Path:
        path = folder / f'{name}.pth'
        if not path.exists():
            layout = read_layout(name)
            content = {**(layout.get('extra') or {}), layout['wrapper']: formula_weights(layout['tensors'])}
            torch.save(content, path)
        return path

    return make


@pytest.fixture(scope='session')
def browser() -> Iterator[Browser]:
    """A real browser without a window, for pages; the tests are skipped, by name, where there is none."""
    program = shutil.which('chromium') or shutil.which('google-chrome')
    if program is None:
        pytest.skip('needs a browser, which is not there: apt-get install chromium')
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


def golden_input(height: int, width: int) -> torch.Tensor:
    """The input of the golden outputs, (1, 3, H, W) in double precision."""
    return torch.from_numpy(np.random.default_rng(height * 1000 + width).standard_normal((1, 3, height, width)))


def randomise_norms(module: torch.nn.Module, seed: int = 0) -> None:
    """Give batch norms statistics and weights as training would leave them, away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (norm.running_mean, -0.2, 0.2),
                (norm.running_var, 0.5, 1.5),
                (norm.weight.data, 0.5, 1.5),
                (norm.bias.data, -0.2, 0.2),
            ):
                tensor.uniform_(low, high, generator=generator)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """PyTorch's operations on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope='module')
def one_thread() -> Iterator[None]:
    """For thousands of tiny operations, in which threads only wait for each other."""
    with threads(1):
        yield


class Largest(TorchDispatchMode):
    """Remembers the most elements that a tensor had."""

    elements = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--kills', type=int, default=2, help='how often the tests kill a run (default: 2)')
    parser.addoption('--images', type=int, default=150, help='images of the prediction that is killed (default: 150)')
    parser.addoption('--variants', type=int, default=150, help='hostile files that are read (default: 150)')
