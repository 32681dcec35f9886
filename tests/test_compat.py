"""The repairs of the stack: each fails without it, and each does nothing where the defect is absent."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from mmengine.logging import MessageHub
from mmengine.runner.checkpoint import CheckpointLoader, load_from_local

from projects.recnext.recnext import compat
from projects.recnext.recnext.checkpoint import CheckpointError

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
    checkpoint = CheckpointLoader.load_checkpoint(str(tmp_path / 'a.pth'), 'cpu')
    assert checkpoint['message_hub']['log_scalars']['train/loss'].mean() == 1.5
    with pytest.raises(CheckpointError, match='No such checkpoint'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'b.pth'))


def test_importing_prints_nothing():
    result = python('import projects.recnext.recnext')
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')
