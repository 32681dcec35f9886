"""The repairs of the stack: each fails without it, and each does nothing where the defect is absent."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread
from typing import NoReturn

import mmengine.config.config
import mmengine.utils
import numpy
import pytest
import torch
from helpers.malicious import Command
from helpers.reference import ROOT
from mmengine.logging import MessageHub
from mmengine.runner import checkpoint, runner
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils import package_utils
from mmseg.models.backbones import beit
from scipy.ndimage import distance_transform_edt, gaussian_filter

from projects.recnext.recnext.checkpoints.fetch import TransferError
from projects.recnext.recnext.checkpoints.files import CheckpointError
from projects.recnext.recnext.openmmlab import compat

needs_stand_in = pytest.mark.skipif(
    'stand_in_for_mmcv_ops' not in compat.ACTIVE, reason='mmcv is compiled, or mmseg does without: no defect to repair'
)


def hide(module: str, find_spec: Callable) -> Callable:
    return lambda name, *args: None if name == module else find_spec(name, *args)


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def look_for_defects(*options: str) -> dict:
    result = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'stack' / 'defects.py', *options], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_repairs_that_are_active_are_those_of_the_defects_that_are_there():
    """In this stack, whichever it is: each repair finds its defect, and after it there is none."""
    before, after = look_for_defects(), look_for_defects('--repaired')
    assert after == dict(defects=[], active=before['defects'])
    assert {'read_checkpoints_safely', 'write_files_atomically'} <= set(before['defects'])


@needs_stand_in
def test_stand_in_imports_and_raises_when_used():
    result = python(
        'import projects.recnext.recnext, mmseg.models\n'
        'from mmcv.ops import point_sample\n'
        'from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2d\n'
        'from mmengine.utils.dl_utils.parrots_wrapper import is_rocm_pytorch\n'
        'try: import mmcv._ext\n'
        'except ModuleNotFoundError: print("no _ext")\n'
        'try: point_sample(1, 2)\n'
        'except RuntimeError as error: print(error)\n'
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('no _ext') and 'mmcv.ops.point_sample needs a compiled mmcv' in result.stdout
    assert 'MultiScaleDeformableAttention' not in result.stderr


MASK = numpy.array([[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ('module', 'use', 'expected'),
    [
        ('models.losses.huasdorff_distance_loss', lambda module: module.distance(MASK), distance_transform_edt(MASK)),
        ('models.assigners.hungarian_assigner', lambda m: m.linear_sum_assignment([[2, 1], [1, 2]]), ([0, 1], [1, 0])),
        ('models.backbones.beit', lambda module: module.interpolate.interp1d([0, 1], [0, 2])([0.5]), [1.0]),
        ('models.text_encoder.clip_text_encoder', lambda module: module.tokenizer.tokenize('a cat').shape, (1, 77)),
        ('datasets.transforms.transforms', lambda m: m.gaussian_filter(MASK * 1.0, 1), gaussian_filter(MASK * 1.0, 1)),
    ],
)
def test_what_is_imported_when_it_is_used_gives_the_real_thing(module, use, expected):
    found = use(pytest.importorskip(f'mmseg.{module}'))  # mmsegmentation 1.0 lacks some of them
    assert numpy.array_equal(found, expected)


def test_a_package_that_mmengine_imports_finds_the_real_ones(tmp_path):
    """transformers, where it is installed: its lookup of timm ended in an error, and nothing could be imported."""
    Path(tmp_path, 'transformers.py').write_text(
        'import sys, importlib.util\n'
        'for name in ("timm", "scipy.ndimage"):\n'
        '    assert importlib.util.find_spec(name).origin and name not in sys.modules, name\n'
        'class Adafactor: pass\n'
    )
    result = python(
        f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
        'import projects.recnext.recnext, mmseg.registry\n'
        'assert "Adafactor" in dir(sys.modules["transformers"]) and "timm" not in sys.modules\n'
        'from projects.recnext.recnext import compat; print(*compat.ACTIVE)'
    )
    assert result.returncode == 0, result.stderr
    assert 'import_when_used' in result.stdout


def test_a_stand_in_can_be_looked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', beit.interpolate.__class__('timm'))
    assert importlib.util.find_spec('timm').name == 'timm'


def test_what_is_nowhere_is_an_error_when_it_is_used():
    with pytest.raises(AttributeError, match='no attribute'):
        beit.interpolate.interp3d([0, 1], [0, 2])


SHARDING = """
import os, sys
import projects.recnext.recnext, mmengine.model, mmengine.runner
from mmengine.registry import MODEL_WRAPPERS, OPTIMIZERS, STRATEGIES
from mmengine.model import is_model_wrapper
import torch
weight = torch.nn.Parameter(torch.ones(1))
assert not is_model_wrapper(torch.nn.ReLU())
assert 'torch.distributed.fsdp' not in sys.modules
os.environ.update(MASTER_ADDR='localhost', MASTER_PORT='0')
torch.distributed.init_process_group('gloo', rank=0, world_size=1, store=torch.distributed.HashStore())
optimizer = OPTIMIZERS.build(dict(type='ZeroRedundancyOptimizer', optimizer_type='SGD', lr=0.5, params=[weight]))
weight.grad = torch.ones(1)
optimizer.step()
assert weight.item() == 0.5
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
assert isinstance(optimizer, ZeroRedundancyOptimizer) and type(optimizer) is mmengine.optim.ZeroRedundancyOptimizer
wrapper = MODEL_WRAPPERS.get('mmengine.MMFullyShardedDataParallel')
assert issubclass(wrapper, FullyShardedDataParallel) and wrapper is mmengine.model.MMFullyShardedDataParallel
from mmengine._strategy import FSDPStrategy
assert STRATEGIES.get('FSDPStrategy') is FSDPStrategy and MODEL_WRAPPERS.get('mmengine._strategy.FSDPStrategy')
assert not hasattr(mmengine.model, 'Nothing') and OPTIMIZERS.get('Nothing') is None
"""


def test_what_shards_is_there_for_who_asks():
    """By a name in a config or from mmengine's packages, and it works as ever."""
    result = python(SHARDING)
    assert result.returncode == 0, result.stderr


def test_a_version_is_logged_and_nothing_imported_for_it(monkeypatch):
    """The version is that of the package; where none is installed, none is logged."""
    monkeypatch.delitem(sys.modules, 'torchvision', raising=False)
    assert runner.collect_env()['TorchVision'] == metadata.version('torchvision')
    assert 'torchvision' not in sys.modules
    monkeypatch.setitem(sys.modules, 'torchvision', None)  # as if it were not installed
    monkeypatch.setattr(compat.metadata, 'version', missing)
    assert 'TorchVision' not in runner.collect_env()


def missing(name: str) -> NoReturn:
    raise metadata.PackageNotFoundError(name)


def test_stand_in_keeps_away_from_a_compiled_mmcv(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setattr(sys, 'meta_path', list(sys.meta_path))
    monkeypatch.delitem(sys.modules, compat.MMCV_OPS, raising=False)
    before = list(sys.meta_path)
    compat.stand_in_for_mmcv_ops()
    assert sys.meta_path == before


@pytest.mark.parametrize('package', ['mmpretrain', 'timm'])
def test_packages_are_found_without_pkg_resources(monkeypatch, package):
    """By the name of the module or of the distribution, and one that is not there is named."""
    monkeypatch.setattr(compat.importlib.util, 'find_spec', hide('pkg_resources', compat.importlib.util.find_spec))
    for function in ('is_installed', 'get_installed_path'):
        for module in (package_utils, mmengine.utils, mmengine.config.config):
            monkeypatch.setattr(module, function, getattr(module, function))
    repaired = 'find_packages_without_pkg_resources' in compat.ACTIVE or compat.find_packages_without_pkg_resources()
    if not repaired:
        pytest.skip('this mmengine does without pkg_resources')
    assert mmengine.config.config.get_installed_path(package) == str(
        Path(importlib.import_module(package).__file__).parent
    )
    assert mmengine.config.config.is_installed(package) and not package_utils.is_installed('mmnothing')
    with pytest.raises(ModuleNotFoundError, match='mmnothing is not installed'):
        package_utils.get_installed_path('mmnothing')


def test_pkg_resources_is_used_where_it_is_there(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, 'find_spec', lambda name: object())
    assert not compat.find_packages_without_pkg_resources()


def test_a_config_is_formatted_once_and_again_when_it_has_changed():
    cfg = mmengine.config.Config(dict(a=1, b=dict(c=[1, 2])))
    assert cfg.pretty_text is cfg.pretty_text
    cfg.b.c = 'changed'
    assert cfg.pretty_text == "a = 1\nb = dict(c='changed')\n"
    cfg.b.c = [1, 2]
    assert cfg.pretty_text == 'a = 1\nb = dict(c=[\n    1,\n    2,\n])\n'


def test_mmengine_reads_its_own_checkpoints(tmp_path):
    hub = MessageHub('test_compat')
    hub.update_scalar('train/loss', 1.5)
    torch.save(dict(state_dict={'a': torch.ones(2)}, message_hub=hub.state_dict()), tmp_path / 'a.pth')
    read = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), 'cpu')
    assert read['message_hub']['log_scalars']['train/loss'].mean() == 1.5
    with pytest.raises(CheckpointError, match='No such checkpoint'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'b.pth'))


@pytest.fixture
def server(tmp_path):
    """A real HTTP server of the files in ``tmp_path / 'served'``."""
    (tmp_path / 'served').mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / 'served')
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as served:
        Thread(target=served.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{served.server_port}'
        served.shutdown()


@pytest.mark.parametrize('scheme', ['url', 'torchvision'])
def test_downloads_are_read_without_running_them(server, tmp_path, monkeypatch, scheme):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    torch.save({'state_dict': {'a': torch.ones(2)}}, tmp_path / 'served' / 'good.pth')
    torch.save({'evil': Command(tmp_path / 'touched')}, tmp_path / 'served' / 'evil.pth')
    monkeypatch.setattr(checkpoint, 'get_torchvision_models', lambda: {'resnet18': f'{server}/evil.pth'})
    read = CheckpointLoader.load_checkpoint(f'{server}/good.pth', 'cpu')
    assert read['state_dict']['a'].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r'refused.*posix\.system'):
        CheckpointLoader.load_checkpoint(f'{server}/evil.pth' if scheme == 'url' else 'torchvision://resnet18', 'cpu')
    assert not (tmp_path / 'touched').exists()
    with pytest.raises(TransferError, match=r'none\.pth cannot be downloaded.*404'):
        CheckpointLoader.load_checkpoint(f'{server}/none.pth', 'cpu')


@pytest.mark.full
def test_a_user_of_the_configs_is_not_warned_of_what_mmseg_does(tmp_path):
    code = (
        'from projects.recnext.recnext.openmmlab.builder import build_on_meta, released_model_cfg\n'
        'import warnings\n{}build_on_meta(released_model_cfg("m0"))'
    )
    loud, quiet = (python(code.format(line)) for line in ('warnings.resetwarnings()\n', ''))
    assert 'build_loss' in loud.stderr and 'avg_non_ignore' in loud.stderr
    assert (quiet.returncode, quiet.stderr) == (0, '')


def test_importing_prints_nothing():
    result = python('import projects.recnext.recnext')
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')
