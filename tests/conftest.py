"""Shared fixtures: reference files, small checkpoints, a browser."""

import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

# Read where torch is imported, here and in what is started. Tests share the cores with one another, and with others:
# the threads of one would wait for each other.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import pytest
import torch
from helpers import strength
from helpers.isolation import stay_on_this_machine
from helpers.networks import threads
from helpers.reference import read_layout, shared
from helpers.sites import CAMERA, SOFTWARE_GPU, find_browser
from helpers.tiny import write_tiny
from mmengine.registry import init_default_scope

import projects.recnext.recnext.openmmlab  # noqa: F401  (registers, as training and testing do)
from projects.recnext.recnext.samples.scenes import write_dataset
from projects.recnext.recnext.utils.devices import find_device

init_default_scope('mmseg')  # as a config does
sys.addaudithook(stay_on_this_machine)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--full', action='store_true', help='more kills, examples and hostile files, as make test-all')
    parser.addoption('--device', default='cpu', metavar='DEVICE', help='of the tests marked gpu, as make gpu has it')


def pytest_configure(config: pytest.Config) -> None:
    """Set what is the same for all tests, before any of them is imported."""
    strength.settings.load_profile('full' if config.getoption('--full') else 'fast')
    if not hasattr(config, 'workerinput'):  # the workers of pytest-xdist have their controller's
        # Whatever is started leaves its temporary files in a folder that goes with the session.
        folder = tempfile.mkdtemp(prefix='tests-')  # short: the path of a socket has 108 bytes
        os.environ['TMPDIR'] = tempfile.tempdir = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--full``, leave out cases beside others that touch the same code: see the markers in pyproject.toml."""
    if config.getoption('--full'):
        return
    kept, left_out, cases = [], [], Counter()
    for item in items:
        every, function = item.get_closest_marker('every'), item.nodeid.partition('[')[0]
        some = every is None or cases[function] % every.args[0] == 0
        cases[function] += 1
        (kept if some and not item.get_closest_marker('full') else left_out).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Spare garbage collections the millions of objects of what is imported: mmengine collects for every dataset."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='session')
def full(request) -> bool:
    """Whether everything is tested at full strength."""
    return request.config.getoption('--full')


@pytest.fixture(scope='session')
def device(request) -> torch.device:
    """What the tests marked ``gpu`` run on."""
    return find_device(request.config.getoption('--device'))


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
def scenes(tmp_path_factory) -> Path:
    """A dataset to read, of eight scenes to train on and three to test with; what spoils it copies it."""
    root = tmp_path_factory.mktemp('data') / 'scenes'
    write_dataset(root, training=8, validation=3)
    return root


@pytest.fixture(scope='session')
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny config and a checkpoint of it."""
    return write_tiny(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(scope='session')
def browser() -> Iterator:
    """A real browser without a window, for pages; the tests are skipped, by name, where there is none."""
    sync_api = pytest.importorskip('playwright.sync_api')
    program = find_browser()
    if program is None:
        pytest.skip('needs a browser, which is not there: apt-get install chromium')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*CAMERA, *SOFTWARE_GPU])
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def one_thread() -> Iterator[None]:
    """For thousands of tiny operations, in which threads only wait for each other."""
    with threads(1):
        yield
