"""The list of released files: complete, with the figures as they were published, and everywhere the same."""

import re

import _model_zoo as model_zoo
import modelindex
import pytest
from helpers.reference import ARCH_NAMES, CONFIGS, ROOT, SEGMENTORS, config_of, released_model_cfg

from projects.recnext.recnext.checkpoints.releases import list_models, read_releases, read_sources
from projects.recnext.recnext.openmmlab.builder import build_on_meta
from projects.recnext.recnext.utils.errors import UserError

# aAcc, mIoU, mAcc of the training logs, and milliseconds on an iPhone 12.
ADE20K = dict(
    m3=(79.90, 40.98, 52.00, 5.6),
    m4=(80.66, 43.58, 54.89, 7.2),
    m5=(82.00, 46.01, 56.79, 12.4),
    a3=(79.17, 41.93, 55.14, 8.4),
    a4=(80.08, 43.03, 53.57, 14.0),
    a5=(82.06, 46.53, 56.90, 25.3),
)
# Top-1, distilled and not.
IMAGENET = dict(
    m0=(74.7, 73.2), m1=(79.2, 78.0), m2=(80.3, 79.2), m3=(80.9, 79.6), m4=(82.5, 81.4), m5=(83.3, 82.9),
    a0=(75.0, 73.6), a1=(79.6, 78.3), a2=(80.8, 79.6), a3=(81.1, 80.1), a4=(82.5, 81.6), a5=(83.5, 83.1),
)  # fmt: skip
TREE = 'https://github.com/suous/RecNeXt/releases/download'

RELEASES = {release['name']: release for release in read_releases()}


def address(name: str, arch: str) -> str:
    return f'{TREE}/{"v1.0" if arch.startswith("m") else "v2.0"}/{name}.pth'


def test_the_list_is_complete():
    segmentors = {f'recnext_{arch}_ade20k' for arch in SEGMENTORS}
    imagenet = {f'recnext_{arch}_{kind}_300e' for arch in ARCH_NAMES for kind in ('distill', 'without_distill')}
    assert RELEASES.keys() == segmentors | imagenet and len(read_releases()) == 30
    assert set(list_models()) == segmentors and len(list_models()) == 6


@pytest.mark.parametrize('arch', SEGMENTORS)
def test_segmentors(arch):
    release = RELEASES[f'recnext_{arch}_ade20k']
    assert (release['task'], release['arch']) == ('segmentation', arch)
    assert release['url'] == address(release['name'], arch) and CONFIGS / release['config'] == config_of(arch)
    assert (*release['metrics'].values(), release['backbone_latency_ms']) == ADE20K[arch]
    assert list(release['metrics']) == ['aAcc', 'mIoU', 'mAcc']
    parameters = sum(p.numel() for p in build_on_meta(released_model_cfg(arch)).parameters())
    assert round(parameters / 1e6, 2) == release['parameters_million']


@pytest.mark.parametrize('arch', ARCH_NAMES)
def test_imagenet_files(arch):
    for kind, top1 in zip(('distill', 'without_distill'), IMAGENET[arch]):
        release = RELEASES[f'recnext_{arch}_{kind}_300e']
        assert (release['task'], release['arch']) == ('classification', arch)
        assert release['url'] == address(release['name'], arch) and release['metrics'] == {'top1': top1}
        assert release.get('hub') == (f'suous/recnext_{arch}.dist_300e_in1k' if kind == 'distill' else None)


def test_every_figure_has_a_source():
    figures = {f'metrics of {release["task"]}' for release in RELEASES.values()}
    figures |= {key for release in RELEASES.values() for key in release if key.endswith(('_ms', '_million'))}
    assert read_sources().keys() == figures


@pytest.mark.parametrize('path', model_zoo.render_all(), ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_agree_with_the_list(path):
    assert path.read_text() == model_zoo.render_all()[path], 'run tools/update_model_zoo.py'


def test_update_mends_what_was_changed_by_hand(tmp_path, monkeypatch):
    wrong = tmp_path / 'README.md'
    wrong.write_text((ROOT / 'README.md').read_text().replace('40.98', '41.98'))
    expected = model_zoo.render_all()[ROOT / 'README.md']
    monkeypatch.setattr(model_zoo, 'render_all', lambda: {wrong: expected})
    assert model_zoo.update_model_zoo() == [wrong] and wrong.read_text() == (ROOT / 'README.md').read_text()
    assert model_zoo.update_model_zoo() == []


@pytest.mark.parametrize('text', ['', model_zoo.BLOCK.format(name='x'), 2 * (model_zoo.BLOCK + model_zoo.END)])
def test_a_lost_mark_is_said(text):
    with pytest.raises(UserError, match='once each'):
        model_zoo.fill_block(text.format(name='x'), 'x', '')


def test_metafile_is_a_model_index():
    index = modelindex.load(str(model_zoo.METAFILE))
    assert index.check(silent=True) == []
    models = {model.name: model for model in index.models}
    assert len(models) == 30 and {collection.name for collection in index.collections} == {'RecNeXt'}
    for name, release in RELEASES.items():
        model = models[release['config'].removesuffix('.py') if 'config' in release else name]
        assert model.weights == release['url'] and model.in_collection == 'RecNeXt'
        (result,) = model.results
        assert list(result.metrics.values()) == list(release['metrics'].values())
        if release['task'] == 'segmentation':
            assert (ROOT / model.config).is_file() and model.metadata.data['Batch Size'] == 32
        assert (ROOT / model.code).is_file()


def test_links_of_the_tables_lead_somewhere():
    for path, text in model_zoo.render_all().items():
        if path.suffix == '.md':
            links = [link for link in re.findall(r'\]\(([^)#]+)', text) if '://' not in link]
            assert links and all((path.parent / link).exists() for link in links), path
