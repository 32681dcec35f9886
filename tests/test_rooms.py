"""The rooms of the package: what CONTRIBUTING says of them, and that the core is torch alone.

Which room may import which is checked by import-linter in ``make lint``.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from helpers.reference import ROOT

import projects.recnext.recnext as package

PACKAGE = ROOT / 'projects' / 'recnext' / 'recnext'
FILES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob('*.py'))}
ROOMS = sorted(name.rpartition('/')[0] for name in FILES if name.endswith('/__init__.py'))
OPENMMLAB = {'mmengine', 'mmcv', 'mmseg', 'mmpretrain', 'mmdet'}
UNTIL_LATER = ('export', 'benchmarks', 'reports', 'web')
"""Rooms that still use OpenMMLab, and are yet to be rebuilt on what ``recnext.load`` gives."""

CORE = ('utils', 'models', 'checkpoints', 'samples', 'drawing', 'runtimes', 'predict')


def test_the_tree_in_contributing_is_true():
    """A line for each folder, in which every file that it names exists."""
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    tree = re.search(r'```text\nprojects/recnext/recnext/\n(.*?)```', text, re.DOTALL)[1]
    named = [line.split()[0].rstrip('/') for line in tree.splitlines()]
    assert sorted(name for name in named if not name.endswith('.py')) == ROOMS
    assert sorted(name for name in named if name.endswith('.py')) == sorted(name for name in FILES if '/' not in name)


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool, list[str]]]:
    """Of each import: the module, whether a function makes it, and what it takes out of the module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, inside, []) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield '.' * child.level + (child.module or ''), inside, [alias.name for alias in child.names]
        else:
            yield from imports(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.parametrize('name', FILES)
def test_a_file_says_what_it_is_for_and_imports_what_it_may(name):
    """Private names stay in their file, and OpenMMLab and timm in theirs."""
    room = name.partition('/')[0]
    assert ast.get_docstring(FILES[name])
    for module, inside, names in imports(FILES[name]):
        top = module.partition('.')[0]
        if module.startswith(('.', 'projects.')):
            assert not [private for private in names if private.startswith('_') and not private.endswith('__')]
            if 'openmmlab' in (*module.split('.'), *names) and room not in ('openmmlab', *UNTIL_LATER):
                assert inside and (room == 'cli' or name == 'predict/model.py'), module
        assert top not in ('tools', '_cli')
        if room not in ('openmmlab', *UNTIL_LATER):
            # The one thing of mmengine that the command line takes: how --cfg-options is read.
            assert top not in OPENMMLAB or (name == 'cli/options.py' and names == ['DictAction']), module
            assert top != 'timm' or name == 'timm.py', module


def test_what_the_package_shows_is_imported_when_it_is_asked_for():
    assert {'load', 'Model', 'Predictor', 'list_models'} <= set(package.__all__) == set(dir(package))
    for name in package.__all__:
        assert getattr(getattr(package, name), '__name__', name) == name
    with pytest.raises(AttributeError, match='has no attribute'):
        importlib.import_module('projects.recnext.recnext').Nothing  # noqa: B018


BRINGS = """
import importlib, json, sys
importlib.import_module('projects.recnext.recnext' + sys.argv[1])
print(json.dumps(sorted({'torch', 'mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'timm'} & set(sys.modules))))
"""


@pytest.mark.parametrize(
    ('concept', 'without'),
    [
        ('', {'torch', 'mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'timm'}),
        ('.samples.scenes', {'torch', 'mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'timm'}),
        ('.predict.inputs', {'torch', 'mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'timm'}),
        ('.timm', {'mmcv', 'mmengine', 'mmseg', 'mmpretrain'}),
        # mmseg's backbones import timm.
        pytest.param('.openmmlab', {'mmpretrain'}, marks=pytest.mark.full),
    ],
)
def test_a_concept_imports_what_it_needs(concept, without):
    result = subprocess.run([sys.executable, '-c', BRINGS, concept], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert not without & set(json.loads(result.stdout)), result.stdout


ALONE = """
import sys
from importlib import import_module
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('mmengine', 'mmcv', 'mmseg', 'mmpretrain', 'mmdet', 'timm'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Absent())
package = import_module('projects.recnext.recnext')
assert all(getattr(package, name) for name in package.__all__)
for name in sys.argv[1:]:
    import_module(name)
import torch
from projects.recnext.recnext.models.classifier import TwoBranchHead
from projects.recnext.recnext.models.semantic_fpn import RecNeXtSegmentor
import numpy
segmentor = RecNeXtSegmentor('m0', 3).eval()
segmentor.switch_to_deploy()
labels, = segmentor.label_maps([segmentor.prepare(numpy.zeros((40, 50, 3), numpy.uint8))])
assert labels.shape == (40, 50)
"""


def test_the_core_is_torch_alone():
    """Where neither OpenMMLab nor timm is installed, each of its files is imported, and a network labels an image."""
    modules = [name.removesuffix('.py').replace('/', '.') for name in FILES if name.partition('/')[0] in CORE]
    command = [sys.executable, '-c', ALONE, *(f'{package.__name__}.{module}' for module in modules)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert len(modules) > 40
