"""The rooms of the package: what CONTRIBUTING says of them, and that a concept brings only what it needs.

Which room may import which is checked by import-linter in ``make lint``.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.reference import ROOT

import projects.recnext.recnext as package

PACKAGE = ROOT / 'projects' / 'recnext' / 'recnext'
FILES = sorted(PACKAGE.rglob('*.py'))
ROOMS = sorted(path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob('__init__.py'))[1:]


def test_the_tree_in_contributing_is_true():
    """A line for each folder, in which every file that it names exists."""
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    tree = re.search(r'```text\nprojects/recnext/recnext/\n(.*?)```', text, re.DOTALL)[1]
    named = [line.split()[0].rstrip('/') for line in tree.splitlines()]
    assert sorted(name for name in named if not name.endswith('.py')) == ROOMS
    assert sorted(name for name in named if name.endswith('.py')) == sorted(path.name for path in PACKAGE.glob('*.py'))


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_says_what_it_is_for_and_keeps_its_private_names(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            ours = node.level > 0 or (node.module or '').startswith('projects.')
            assert not (ours and [alias.name for alias in node.names if alias.name.startswith('_')])
            assert (node.module or '').partition('.')[0] not in ('tools', '_cli')


def test_what_configs_may_name_is_registered_from_low_rooms():
    assert {module.partition('.')[0] for module in package.REGISTERED.values()} <= {
        'datasets', 'engine', 'evaluation', 'models', 'visualization',
    }  # fmt: skip
    for name in package.__all__:
        assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match='has no attribute'):
        importlib.import_module('projects.recnext.recnext').Nothing  # noqa: B018


BRINGS = """
import importlib, json, sys
importlib.import_module('projects.recnext.recnext' + sys.argv[1])
print(json.dumps(sorted({'torch', 'mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'timm'} & set(sys.modules))))
"""


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ('concept', 'without'),
    [
        ('', {'torch', 'mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'timm'}),
        ('.datasets.samples.scenes', {'torch', 'mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'timm'}),
        ('.apis.batch_inputs', {'torch', 'mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'timm'}),
        ('.weights.checkpoint', {'mmcv', 'mmseg', 'mmpretrain', 'timm'}),
        ('.models.label_map', {'mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'timm'}),
        ('.models.recnext', {'mmseg', 'mmpretrain', 'timm'}),
        ('.models.segmentor', {'mmpretrain', 'timm'}),
    ],
)
def test_a_concept_imports_what_it_needs(concept, without):
    result = subprocess.run([sys.executable, '-c', BRINGS, concept], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert not without & set(json.loads(result.stdout)), result.stdout


REGISTERS = """
import sys
from pathlib import Path
import projects.recnext.recnext
assert 'mmengine' not in sys.modules
from mmengine.registry import {registry}
assert {registry}.get({name!r}) is not None
"""


@pytest.mark.parametrize(
    ('registry', 'name'), [('MODELS', 'RecNeXt'), pytest.param('HOOKS', 'DeployHook', marks=pytest.mark.full)]
)
def test_parts_are_registered_when_a_registry_is_asked(registry, name):
    """In MMEngine's own registries, without mmseg being named; ``MODELS.build`` in other scopes falls back on these."""
    code = REGISTERS.format(registry=registry, name=name)
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(ROOT))
    assert result.returncode == 0, result.stderr
