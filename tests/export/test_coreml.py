"""Core ML: what is saved, read back and executed, is what PyTorch computes; what cannot be is said."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.exports import SIZE, export_to, labels_of, left_behind, picture, pixels
from helpers.reference import ROOT

from projects.recnext.recnext.export import exporter
from projects.recnext.recnext.export.coreml import SUFFIXES, CoreMLBackend, open_model
from projects.recnext.recnext.export.source import load_source
from projects.recnext.recnext.utils.errors import UserError

EXACT = CoreMLBackend(precision='fp32')


@pytest.mark.parametrize(
    ('mixer', 'format', 'precision', 'least'),
    [
        ('conv', 'mlprogram', 'fp16', 0.995),
        pytest.param('conv', 'neuralnetwork', 'fp32', 1.0, marks=pytest.mark.full),
        *(pytest.param(mixer, 'mlprogram', 'fp32', 1.0, marks=pytest.mark.full) for mixer in ('conv', 'attn')),
        pytest.param('conv', 'neuralnetwork', 'fp16', 0.995, marks=pytest.mark.full),
        pytest.param('attn', 'mlprogram', 'fp16', 0.995, marks=pytest.mark.full),
        pytest.param('attn', 'neuralnetwork', 'fp32', 1.0, marks=pytest.mark.full),
        pytest.param('attn', 'neuralnetwork', 'fp16', 0.995, marks=pytest.mark.full),
    ],
)
def test_the_saved_segmentor_gives_the_labels_of_pytorch(tiny_of, tmp_path, mixer, format, precision, least):
    tiny = tiny_of(mixer)
    out = tmp_path / f'new folder/tiny{SUFFIXES[format]}'
    table = export_to(out, CoreMLBackend(format, precision), tiny, size=[SIZE])
    for word in (str(out), 'MB', '64 x 128', 'conv', 'multiply-adds', precision, 'or later', 'labels equal', 'next'):
        assert word in table
    assert left_behind(out.parent) == [out.name]
    image = picture(SIZE)
    labels = open_model(out)(pixels(image))['labels']
    assert labels.shape == SIZE and labels.dtype == np.int32 and len(np.unique(labels)) > 1
    assert (labels == labels_of(tiny, image)).mean() >= least


@pytest.fixture(scope='module')
def package(tiny, tmp_path_factory) -> Path:
    """A file with both outputs, whose weights are not compressed."""
    out = tmp_path_factory.mktemp('package') / 'a.mlpackage'
    export_to(out, CoreMLBackend(), tiny, size=[SIZE], output='both', verify=False)
    return out


def test_a_file_says_what_it_is(package):
    description = open_model(package).spec.description
    (image,) = description.input
    assert (image.name, image.type.imageType.height, image.type.imageType.width) == ('image', *SIZE)
    assert image.type.imageType.colorSpace == image.type.imageType.RGB
    types = {
        out.name: (list(out.type.multiArrayType.shape), out.type.multiArrayType.dataType) for out in description.output
    }
    array = description.output[0].type.multiArrayType
    assert types == dict(labels=([*SIZE], array.INT32), logits=([1, 150, 16, 32], array.FLOAT32))
    # The app developer's page says the same.
    page = (ROOT / 'docs' / 'phone.md').read_text()
    assert '`image`' in page and '`labels`' in page and 'Int32' in page
    own = description.metadata.userDefined
    preview = json.loads(own['com.apple.coreml.model.preview.params'])
    assert own['com.apple.coreml.model.preview.type'] == 'imageSegmenter'
    assert preview['labels'][:2] == ['wall', 'building'] and len(preview['labels']) == len(preview['colors']) == 150
    assert preview['colors'][0] == '#787878'
    assert own['config'] == 'tiny' and own['checkpoint'] == 'tiny.pth' and len(own['sha256']) == 64
    assert description.metadata.license == 'Apache-2.0' and 'RecNeXt' in description.metadata.author


@pytest.mark.parametrize(
    ('mixer', 'fuse'),
    [
        pytest.param(mixer, fuse, marks=pytest.mark.full)
        for mixer in ('conv', 'attn')
        for fuse in ('none', 'norms', 'all')
    ],
)
def test_any_form_and_sizes_that_are_no_powers_of_two(tiny_of, tmp_path, mixer, fuse):
    tiny, size = tiny_of(mixer), (96, 160)
    table = export_to(tmp_path / 'a.mlpackage', EXACT, tiny, size=[size], fuse=fuse)
    assert f'folded: {fuse}' in table
    assert ('pixel_shuffle' in table) == (fuse == 'all') and 'scatter' not in table
    image = picture(size)
    assert np.array_equal(open_model(tmp_path / 'a.mlpackage')(pixels(image))['labels'], labels_of(tiny, image))


@pytest.mark.full
@pytest.mark.parametrize('mixer', ['conv', 'attn'])
def test_several_sizes(tiny_of, tmp_path, mixer):
    tiny = tiny_of(mixer)
    sizes = [(128, 192), (192, 128)]
    export_to(tmp_path / 'a.mlpackage', EXACT, tiny, size=sizes, verify=False)
    saved = open_model(tmp_path / 'a.mlpackage')
    enumerated = saved.spec.description.input[0].type.imageType.enumeratedSizes.sizes
    assert {(one.height, one.width) for one in enumerated} == set(sizes)
    for size in sizes:
        image = picture(size)
        assert np.array_equal(saved(pixels(image))['labels'], labels_of(tiny, image)), size


@pytest.mark.parametrize(
    ('mixer', 'format'),
    [
        ('attn', 'neuralnetwork'),
        pytest.param('conv', 'neuralnetwork', marks=pytest.mark.full),
        pytest.param('conv', 'mlprogram', marks=pytest.mark.full),
        pytest.param('attn', 'mlprogram', marks=pytest.mark.full),
    ],
)
def test_the_bare_backbone(tiny_of, tmp_path, mixer, format):
    tiny = tiny_of(mixer)
    out = tmp_path / f'a{SUFFIXES[format]}'
    table = export_to(out, CoreMLBackend(format, 'fp32'), tiny, part='backbone', size=[SIZE])
    assert 'of the largest feature' in table
    inputs = torch.randn(1, 3, *SIZE)
    saved = open_model(out)(inputs.numpy())
    with torch.no_grad():
        features = load_source(*tiny, 'none').original.backbone(inputs)
    for index, feature in enumerate(features):
        assert np.abs(saved[f'feature_{index}'] - feature.numpy()).max() < 1e-4 * feature.abs().max()


def bytes_of_weights(package: Path) -> int:
    return (package / 'Data/com.apple.CoreML/weights/weight.bin').stat().st_size


@pytest.mark.full
@pytest.mark.parametrize('how', ['linear8', 'palettize'])
def test_compressed_weights(tiny, package, tmp_path, how):
    out = tmp_path / f'{how}.mlpackage'
    # Random weights make labels that are closer to each other than those of a trained network.
    table = export_to(out, CoreMLBackend(compress=how), tiny, size=[SIZE], verify=False)
    assert f'weights {how}' in table and 'verified      no' in table
    assert bytes_of_weights(out) < 0.7 * bytes_of_weights(package)
    image = picture(SIZE)
    assert (open_model(out)(pixels(image))['labels'] == labels_of(tiny, image)).mean() > 0.9


@pytest.mark.full
def test_overflow_in_16_bits_is_caught(tiny, tmp_path, monkeypatch):
    def enlarge(*args: object) -> object:
        source = load_source(*args)
        for network in (source.original, source.folded):
            network.backbone.stem[2].conv.weight.data *= 1e6
        return source

    monkeypatch.setattr(exporter, 'load_source', enlarge)
    with pytest.raises(UserError, match='--precision fp32'):
        export_to(tmp_path / 'a.mlpackage', CoreMLBackend(), tiny, size=[SIZE])
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ('own', 'options', 'words'),
    [
        ({}, dict(size=[(65, 128)]), ['multiples of 32', '65 x 128', '64 128']),
        ({}, dict(size=[(128, 128), (96, 128)]), ['multiples of 64', '96 x 128']),
        ({}, dict(size=[(128, 128), (128, 128)]), ['twice']),
        (dict(format='neuralnetwork'), dict(out='a.mlmodel', size=[(96, 128)]), ['64', '--format mlprogram']),
        (dict(format='neuralnetwork', target='iOS16'), dict(out='a.mlmodel'), ['iOS13, iOS14', 'iOS16']),
        (dict(format='neuralnetwork'), {}, ['.mlmodel', 'a.mlpackage']),
        (dict(format='neuralnetwork', compress='linear8'), dict(out='a.mlmodel'), ['--format mlprogram']),
        (dict(target='iOS14'), {}, ['iOS15', 'iOS14']),
        (dict(target='iOS15', compress='linear8'), {}, ['iOS16']),
        (dict(precision='fp32', compress='palettize'), {}, ['fp16']),
        ({}, dict(benchmark=True), ['macOS']),
        ({}, dict(images=['nowhere.jpg']), ['nowhere.jpg']),
        ({}, dict(out='taken.mlpackage'), ['taken.mlpackage is there already']),
        ({}, dict(size=None, cfg_options=dict(crop_size=None)), ['no crop_size', '--size HEIGHT WIDTH']),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(tiny, tmp_path, own, options, words):
    (tmp_path / 'taken.mlpackage').mkdir()
    options = {'out': 'a.mlpackage', 'size': [SIZE], **options}
    with pytest.raises(UserError) as error:
        export_to(tmp_path / options.pop('out'), CoreMLBackend(**own), tiny, **options)
    assert all(word in str(error.value) for word in words), error.value
    assert left_behind(tmp_path) == ['taken.mlpackage']
