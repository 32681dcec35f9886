"""requirements.txt names all that the package and its main extras want, in the same ranges."""

from pathlib import Path

import pytest
from helpers.reference import ROOT
from packaging.requirements import Requirement

tomllib = pytest.importorskip('tomllib', reason='Python 3.10 reads no TOML')


def parse(lines: list[str]) -> dict[str, str]:
    texts = [line.partition('#')[0].strip() for line in lines]
    found = [Requirement(text) for text in texts if text and not text.startswith('-')]
    return {one.name: str(one.specifier) for one in found}


def test_requirements_are_the_base_and_the_extras():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    extras = project['optional-dependencies']
    base = parse(project['dependencies'])
    expected = {
        **base,
        **parse(extras['mmseg']),
        **parse(extras['timm']),
        'coremltools': parse(extras['coreml'])['coremltools'],
    }
    assert parse((ROOT / 'requirements.txt').read_text().splitlines()) == expected
    assert not {'mmengine', 'mmcv-lite', 'mmsegmentation', 'mmpretrain', 'timm', 'torchvision'} & base.keys()


def test_a_file_of_the_core_wants_no_more_than_the_base():
    """What `pip install .` brings is what models, checkpoints and prediction import at their top."""
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    modules = {'opencv-python': 'cv2', 'pillow': 'PIL', 'huggingface_hub': 'huggingface_hub'}
    known = {modules.get(name, name) for name in parse(project['dependencies'])}
    import ast
    import sys

    package = ROOT / 'projects' / 'recnext' / 'recnext'
    for room in ('utils', 'models', 'checkpoints', 'runtimes', 'predict', 'drawing', 'samples'):
        for path in sorted(Path(package, room).glob('*.py')):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module]
                else:
                    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    top = name.partition('.')[0]
                    assert top in known or top in sys.stdlib_module_names, (path, name)
