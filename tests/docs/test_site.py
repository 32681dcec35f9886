"""What the site is made of: diagrams, the reference of configs, the tutorial. CI runs `make docs` itself."""

import re
import shutil
from pathlib import Path

import draw
import pytest
from helpers.reference import ADE20K_CONFIGS, CLASSIFIER_CONFIGS, ROOT, SEGMENTOR_CONFIGS
from markdown_it import MarkdownIt
from mmengine.config import Config

DOCS = ROOT / 'docs'
TUTORIAL = DOCS / 'tutorial.ipynb'
PAGES = sorted([*ROOT.glob('*.md'), *DOCS.rglob('*.md')])


@pytest.mark.parametrize('name', draw.DRAWINGS)
def test_a_diagram_is_what_the_script_draws(name):
    assert (DOCS / 'diagrams' / f'{name}.svg').read_text() == draw.DRAWINGS[name]().svg()


@pytest.mark.parametrize('path', PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_picture_says_what_it_shows(path):
    tokens = [part for token in MarkdownIt().parse(path.read_text()) for part in token.children or []]
    assert [token.attrs['src'] for token in tokens if token.type == 'image' and len(token.content) < 20] == []


def test_every_config_key_is_explained():
    page = (DOCS / 'reference' / 'configs.md').read_text()
    named = set(re.findall(r'`([\w.]+)', page))
    configs = [Config.fromfile(path) for path in {*ADE20K_CONFIGS, *SEGMENTOR_CONFIGS, *CLASSIFIER_CONFIGS}]
    keys = {key for config in configs for key in config if key != 'model'}
    keys |= {f'model.{key}' for config in configs for key in config.model if key != '_scope_'}
    keys |= {key for config in configs for key in config.default_hooks}
    assert keys - named == set()


def test_the_tutorial_shows_what_it_did():
    nbformat = pytest.importorskip('nbformat')
    notebook = nbformat.read(TUTORIAL, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == 'code']
    quiet = [cell.source for cell in code if not cell.outputs]
    assert len(quiet) == 1 and quiet[0].startswith('from pathlib import Path')  # it writes a config
    assert sum('image/jpeg' in output.get('data', {}) for cell in code for output in cell.outputs) == 2
    assert TUTORIAL.stat().st_size < 300_000 and str(ROOT) not in TUTORIAL.read_text()


@pytest.mark.full
def test_the_tutorial_runs(real_m3, ade20k_sample, tmp_path):
    pytest.importorskip('nbclient')
    pytest.importorskip('onnxruntime')
    from helpers.notebooks import run_notebook

    mirror = tmp_path / 'mirror'
    mirror.mkdir()
    (mirror / 'recnext_m3_ade20k.pth').symlink_to(real_m3)
    shutil.copy(ade20k_sample / 'images' / 'validation' / 'ADE_val_00000001.jpg', tmp_path / 'photo.jpg')
    notebook = run_notebook(TUTORIAL, tmp_path, {'--dir weights': f'--dir weights --base-url {mirror}'})
    printed = '\n'.join(output.get('text', '') for cell in notebook.cells for output in cell.get('outputs', []))
    assert 'building   40.2%' in printed and 'Traceback' not in printed
    assert (tmp_path / 'tiny.onnx').exists() and list(Path(tmp_path, 'seen', 'overlays').glob('*.jpg'))
