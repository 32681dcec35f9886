"""The repairs of the stack: each fails without it, and each does nothing where the defect is absent."""

import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from conftest import ROOT
from mmengine.logging import MessageHub
from mmengine.runner import checkpoint
from mmengine.runner.checkpoint import CheckpointLoader, load_from_local
from test_checkpoint import Command

from projects.recnext.recnext import compat
from projects.recnext.recnext.checkpoint import CheckpointError
from projects.recnext.recnext.transfer import TransferError

LITE = compat.importlib.util.find_spec('mmcv._ext') is None
needs_lite = pytest.mark.skipif(not LITE, reason='a compiled mmcv is installed: there is no defect to repair')


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, timeout=120)


@needs_lite
def test_mmseg_cannot_be_imported_without_the_stand_in():
    result = python('import mmseg.models')
    assert result.returncode == 1 and "No module named 'mmcv._ext'" in result.stderr


@needs_lite
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


def test_stand_in_keeps_away_from_a_compiled_mmcv(monkeypatch):
    monkeypatch.setattr(compat.importlib.util, 'find_spec', lambda name: object())
    monkeypatch.setattr(sys, 'meta_path', list(sys.meta_path))
    monkeypatch.delitem(sys.modules, compat.MMCV_OPS, raising=False)
    before = list(sys.meta_path)
    compat.stand_in_for_mmcv_ops()
    assert sys.meta_path == before


def test_mmengine_reads_its_own_checkpoints_only_with_the_repair(tmp_path):
    hub = MessageHub('test_compat')
    hub.update_scalar('train/loss', 1.5)
    torch.save(dict(state_dict={'a': torch.ones(2)}, message_hub=hub.state_dict()), tmp_path / 'a.pth')
    with pytest.raises(Exception, match='HistoryBuffer'):
        load_from_local(str(tmp_path / 'a.pth'), 'cpu')
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


def test_a_user_of_the_configs_is_not_warned_of_what_mmseg_does(tmp_path):
    code = (
        'from projects.recnext.recnext.models import build_skeleton, released_model_cfg\n'
        'import warnings\n{}build_skeleton(released_model_cfg("m0"))'
    )
    loud, quiet = (python(code.format(line)) for line in ('warnings.resetwarnings()\n', ''))
    assert 'build_loss' in loud.stderr and 'avg_non_ignore' in loud.stderr
    assert (quiet.returncode, quiet.stderr) == (0, '')


def test_importing_prints_nothing():
    result = python('import projects.recnext.recnext')
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')
