"""The patches of compat.py: each mends a defect that is there, and importing us changes nothing else."""

import json
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from defects import DEFECTS
from helpers.malicious import Command
from helpers.reference import ROOT

from projects.recnext.recnext.openmmlab import compat


def python(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=300)


def last_line_of(*command: object) -> object:
    """What a process prints last, as JSON."""
    result = python(*command)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_each_patch_mends_its_defect():
    """In this stack, whichever it is."""
    assert DEFECTS.keys() == compat.PATCHES.keys() and all(compat.PATCHES.values())
    found = last_line_of(ROOT / 'tests' / 'stack' / 'defects.py')
    assert 'device of a run' in found  # in every stack
    assert last_line_of(ROOT / 'tests' / 'stack' / 'defects.py', '--patched') == []


def test_the_operations_of_the_stub_raise_when_they_are_used():
    if compat.importlib.util.find_spec('mmcv._ext'):
        pytest.skip('mmcv is compiled, and needs no stub')
    stub = compat._MmcvOps(compat.MMCV_OPS)
    with pytest.raises(RuntimeError, match=r'mmcv\.ops\.point_sample needs a compiled mmcv'):
        stub.point_sample(1, 2)
    with pytest.raises(AttributeError):
        stub.__path__  # noqa: B018


def test_no_more_than_scalars_becomes_safe(tmp_path):
    torch.save(dict(evil=Command(tmp_path / 'touched')), tmp_path / 'evil.pth')
    with pytest.raises(pickle.UnpicklingError, match='Weights only load failed'):
        torch.load(tmp_path / 'evil.pth', weights_only=True)
    assert not (tmp_path / 'touched').exists()


UNTOUCHED = """
import inspect, json, logging, os, pkgutil, sys, warnings
sys.path[:0] = ['.', 'tests/stack']
from importlib import import_module, metadata
import cv2, torch, timm, torchvision, yapf.yapflib.yapf_api
import mmcv.transforms, mmcv.cnn.bricks.transformer
from defects import NeutralOps, needs_mmcv_ops
FOREIGN = ['mmengine', 'mmcv', 'mmseg', 'mmpretrain', 'timm', 'torch', 'torchvision', 'yapf', 'cv2', 'numpy']
import mmengine
for module in pkgutil.walk_packages(mmengine.__path__, 'mmengine.'):
    try:
        import_module(module.name)
    except Exception:  # what needs other packages
        pass
if needs_mmcv_ops():
    sys.modules['mmcv.ops'] = NeutralOps('mmcv.ops')
for part in ('apis', 'datasets', 'engine', 'evaluation', 'models', 'utils', 'visualization'):
    import_module(f'mmseg.{part}')
try:
    import_module('mmpretrain.models')
    mmpretrain = True
except Exception:  # absent, or for another mmcv
    mmpretrain = False
sys.modules.pop('mmcv.ops', None)

def is_part(value):
    wrapped = property | staticmethod | classmethod
    return inspect.isroutine(value) or inspect.isclass(value) or isinstance(value, wrapped)

def look():
    seen = {}
    for name, module in list(sys.modules.items()):
        if name.partition('.')[0] not in FOREIGN or module is None:
            continue
        for key, value in list(vars(module).items()):
            if is_part(value):
                seen[f'{name}.{key}'] = value
            if inspect.isclass(value) and value.__module__ == name:
                seen |= {f'{name}.{key}.{inside}': part for inside, part in list(vars(value).items()) if is_part(part)}
            if type(value).__name__ == 'Registry':
                seen |= {f'{name}.{key}[{entry!r}]': part for entry, part in value.module_dict.items()}
            if type(value) is dict:
                seen |= {f'{name}.{key}[{entry!r}]': part for entry, part in value.items() if is_part(part)}
    from mmengine.fileio import get_file_backend
    from mmengine.runner import CheckpointLoader
    seen |= {f'loader of {scheme}': load for scheme, load in CheckpointLoader._schemes.items()}
    seen['backend of a file'] = type(get_file_backend('a.pth', enable_singleton=False))
    return seen

def settings():
    return dict(
        environ=dict(os.environ), finders=list(map(str, sys.meta_path)), filters=list(map(str, warnings.filters)),
        threads=[torch.get_num_threads(), torch.get_num_interop_threads(), cv2.getNumThreads()],
        torch=[str(torch.get_default_dtype()), torch.is_grad_enabled(), torch.backends.cudnn.benchmark],
        level=logging.getLogger().level, handlers=len(logging.getLogger().handlers), random=torch.initial_seed(),
    )

before, set_before = look(), settings()
import projects.recnext.recnext.openmmlab
if mmpretrain:
    import projects.recnext.recnext.openmmlab.classifier
import projects.recnext.recnext.openmmlab.train, projects.recnext.recnext.openmmlab.test
after, set_after = look(), settings()
changed = sorted(key for key, part in before.items() if after.get(key) is not part)
changed += sorted(f'{key}: {set_before[key]} is {now}' for key, now in set_after.items() if set_before[key] != now)
print(json.dumps([len(before), changed]))
"""


def test_importing_us_changes_no_function_class_default_or_setting():
    number, changed = last_line_of('-W', 'ignore', '-c', UNTOUCHED)
    assert number > 50_000
    # mmsegmentation 1.0 alone, where the defect shows
    assert set(changed) <= {'mmseg.engine.hooks.visualization_hook.SegLocalVisualizer'}


BEHAVIOUR = """
import sys
if sys.argv[1:]:
    import projects.recnext.recnext.openmmlab
import json, pickle, tempfile
from pathlib import Path
import mmcv.utils, mmengine.fileio, torch, warnings
from mmengine.runner import CheckpointLoader, find_latest_checkpoint
def outcome(function, *args):
    try:
        return repr(function(*args))
    except BaseException as error:
        return f'{type(error).__name__}: {error}'
def operations():
    from mmcv.ops import nms
    return nms.__module__
with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    (folder / 'file').write_bytes(b'old')
    (folder / 'link').symlink_to('file')
    (folder / 'last_checkpoint').write_text('iter_1.pth')
    torch.save([1, 2], folder / 'list.pth')
    seen = dict(
        operations=outcome(operations),
        environment=outcome(mmcv.utils.collect_env),
        put=outcome(mmengine.fileio.put, b'new', folder / 'link'),
        folder=outcome(mmengine.fileio.put, b'new', folder / 'a' / 'b' / 'file'),
        link=(folder / 'link').is_symlink(), content=(folder / 'file').read_text(),
        get=outcome(mmengine.fileio.get, folder / 'link'),
        absent=outcome(mmengine.fileio.get, folder / 'absent'),
        pickled=type(pickle.loads(pickle.dumps(mmengine.fileio.get_file_backend(folder)))).__qualname__,
        latest=outcome(find_latest_checkpoint, folder),
        list=outcome(CheckpointLoader.load_checkpoint, str(folder / 'list.pth'), 'cpu'),
        missing=outcome(CheckpointLoader.load_checkpoint, str(folder / 'missing.pth'), 'cpu'),
    )
    print(json.dumps({key: str(value).replace(temporary, '') for key, value in seen.items()}))
"""


def test_a_process_goes_on_as_it_would_without_us():
    """The operations of mmcv, files, the newest checkpoint, the loaders: as libraries beside us expect them."""
    without, with_us = (last_line_of('-c', BEHAVIOUR, *ours) for ours in ([], ['with us']))
    assert with_us == without
    assert without['content'] == 'new' and without['get'] == "b'new'" and without['absent'].startswith('FileNotFound')
    if not compat.importlib.util.find_spec('mmcv._ext'):
        assert without['operations'].startswith('ModuleNotFoundError')


def test_importing_prints_nothing():
    """But for what the maintained fork prints by itself."""
    names = 'mmseg.models, mmseg.datasets', 'projects.recnext.recnext.openmmlab'
    theirs, ours = (python('-c', f'import {name}') for name in names)
    assert ours.returncode == 0 and not ours.stderr
    assert set(ours.stdout.splitlines()) <= set(theirs.stdout.splitlines())


def test_what_the_package_logs_goes_to_the_log_of_the_run(monkeypatch):
    """Once, at its level, and nothing of other packages."""
    logger = logging.getLogger('projects.recnext.recnext')
    for name in ('handlers', 'level', 'propagate'):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    said = []
    monkeypatch.setattr('mmengine.logging.print_log', lambda *line: said.append(line))
    for _ in range(2):
        compat.forward_log()
    logging.getLogger('projects.recnext.recnext.models.a').warning('%d tensors', 3)
    logging.getLogger('projects.other').warning('nothing of ours')
    assert said == [('3 tensors', 'current', logging.WARNING)]
