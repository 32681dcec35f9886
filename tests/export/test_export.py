"""Core ML and ONNX: what is saved, read back and executed, is what PyTorch computes; what is wrong is caught."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.networks import randomise_norms
from helpers.reference import ROOT, config_of, read_layout
from helpers.strength import examples
from helpers.tools import assert_user_error, run_tool
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from projects.recnext.recnext.datasets.samples.scenes import make_scene
from projects.recnext.recnext.engine.config import load_config
from projects.recnext.recnext.export import coreml
from projects.recnext.recnext.export import onnx as onnx_export
from projects.recnext.recnext.export.capture import ExportedSegmentor, capture
from projects.recnext.recnext.export.coreml import export_coreml
from projects.recnext.recnext.export.coreml_benchmark import trimmed_mean
from projects.recnext.recnext.export.coreml_evaluator import (
    UnknownOperation,
    open_model,
    resize_bilinear,
    resize_nearest,
)
from projects.recnext.recnext.export.onnx import export_onnx
from projects.recnext.recnext.export.source import load_source
from projects.recnext.recnext.models.builder import build_without_weights
from projects.recnext.recnext.utils.errors import UserError

ct = pytest.importorskip('coremltools')
mb = pytest.importorskip('coremltools.converters.mil').Builder

needs_onnx = pytest.mark.skipif(
    None in map(importlib.util.find_spec, onnx_export.PACKAGES), reason=f'needs {", ".join(onnx_export.PACKAGES)}'
)

MIXERS = ('conv', 'attn')
SIZE = (64, 128)

TINY = """
_base_ = [{base!r}]
arch = dict(_delete_=True, channels=(8, 16, 32, 64), depths=(1, 1, 1, 1), mlp_ratio=2, token_mixer={mixer!r})
model = dict(
    backbone=dict(arch=arch),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    decode_head=dict(in_channels=[32, 32, 32, 32], channels=16),
)
"""


def write_tiny(folder: Path, mixer: str) -> tuple[str, str]:
    """Config and checkpoint of a segmentor small enough to export it many times over."""
    config = folder / 'tiny.py'
    config.write_text(TINY.format(base=str(config_of('m3')), mixer=mixer))
    torch.manual_seed(0)
    segmentor = build_without_weights(load_config(config).model)
    randomise_norms(segmentor)
    # Otherwise one class wins everywhere: the weights of a head are initialised close to zero.
    nn.init.normal_(segmentor.decode_head.conv_seg.weight)
    torch.save(dict(state_dict=segmentor.state_dict(), meta={}), folder / 'tiny.pth')
    return str(config), str(folder / 'tiny.pth')


@pytest.fixture(scope='module', params=MIXERS)
def tiny(request, tmp_path_factory) -> tuple[str, str]:
    return write_tiny(tmp_path_factory.mktemp('tiny'), request.param)


@pytest.fixture(scope='module')
def tiny_m(tmp_path_factory) -> tuple[str, str]:
    """For what is the same for both token mixers."""
    return write_tiny(tmp_path_factory.mktemp('tiny'), 'conv')


def labels_of(config: str, checkpoint: str, image: np.ndarray) -> np.ndarray:
    """The label map (H, W) of an image (H, W, 3) in BGR, computed by the network as trained."""
    original = load_source(config, checkpoint, 'none').original
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    inputs = ((torch.from_numpy(image[..., ::-1].copy()) - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = original._forward(inputs)
        return F.interpolate(logits, image.shape[:2], mode='bilinear').argmax(1)[0].numpy()


def picture(size: tuple[int, int], seed: int = 5) -> np.ndarray:
    return cv2.resize(make_scene(seed)[0][..., ::-1].copy(), size[::-1])


def pixels(image: np.ndarray) -> np.ndarray:
    return image[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32)


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ('format', 'precision', 'least'),
    [
        ('mlprogram', 'fp32', 1.0),
        ('mlprogram', 'fp16', 0.995),
        ('neuralnetwork', 'fp32', 1.0),
        ('neuralnetwork', 'fp16', 0.995),
    ],
)
def test_the_saved_segmentor_gives_the_labels_of_pytorch(tiny, tmp_path, format, precision, least):
    out = tmp_path / f'new folder/tiny{coreml.SUFFIXES[format]}'
    table = export_coreml(*tiny, out=str(out), size=[SIZE], format=format, precision=precision)
    for word in (str(out), 'MB', '64 x 128', 'conv', 'multiply-adds', precision, 'or later', 'labels equal', 'next'):
        assert word in table
    assert left_behind(out.parent) == [out.name]
    image = picture(SIZE)
    labels = open_model(out)(pixels(image))['labels']
    assert labels.shape == SIZE and labels.dtype == np.int32 and len(np.unique(labels)) > 1
    assert (labels == labels_of(*tiny, image)).mean() >= least


def test_a_file_says_what_it_is(tiny_m, tmp_path):
    config, checkpoint = tiny_m
    export_coreml(config, checkpoint, out=str(tmp_path / 'a.mlpackage'), size=[SIZE], output='both')
    description = open_model(tmp_path / 'a.mlpackage').spec.description
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


@pytest.mark.parametrize('fuse', ['none', 'norms', 'all'])
def test_any_form_and_sizes_that_are_no_powers_of_two(tiny, tmp_path, fuse):
    size = (96, 160)
    table = export_coreml(*tiny, out=str(tmp_path / 'a.mlpackage'), size=[size], precision='fp32', fuse=fuse)
    assert f'folded: {fuse}' in table
    assert ('pixel_shuffle' in table) == (fuse == 'all') and 'scatter' not in table
    image = picture(size)
    assert np.array_equal(open_model(tmp_path / 'a.mlpackage')(pixels(image))['labels'], labels_of(*tiny, image))


def test_several_sizes(tiny, tmp_path):
    sizes = [(128, 192), (256, 128)]
    export_coreml(*tiny, out=str(tmp_path / 'a.mlpackage'), size=sizes, precision='fp32')
    saved = open_model(tmp_path / 'a.mlpackage')
    enumerated = saved.spec.description.input[0].type.imageType.enumeratedSizes.sizes
    assert {(one.height, one.width) for one in enumerated} == set(sizes)
    for size in sizes:
        image = picture(size)
        assert np.array_equal(saved(pixels(image))['labels'], labels_of(*tiny, image)), size


@pytest.mark.parametrize('format', coreml.SUFFIXES)
def test_the_bare_backbone(tiny, tmp_path, format):
    out = tmp_path / f'a{coreml.SUFFIXES[format]}'
    table = export_coreml(*tiny, out=str(out), part='backbone', size=[SIZE], format=format, precision='fp32')
    assert 'of the largest feature' in table
    inputs = torch.randn(1, 3, *SIZE)
    saved = open_model(out)(inputs.numpy())
    with torch.no_grad():
        features = load_source(*tiny, 'none').original.backbone(inputs)
    for index, feature in enumerate(features):
        assert np.abs(saved[f'feature_{index}'] - feature.numpy()).max() < 1e-4 * feature.abs().max()


@pytest.mark.parametrize('how', ['linear8', 'palettize'])
def test_compressed_weights(tiny_m, tmp_path, how):
    sizes = {}
    for compress in ('none', how):
        out = tmp_path / f'{compress}.mlpackage'
        # Random weights make labels that are closer to each other than those of a trained network.
        table = export_coreml(*tiny_m, out=str(out), size=[SIZE], compress=compress, verify=False)
        sizes[compress] = (out / 'Data/com.apple.CoreML/weights/weight.bin').stat().st_size
    assert f'weights {how}' in table and 'verified      no' in table
    assert sizes[how] < 0.7 * sizes['none']
    image = picture(SIZE)
    assert (open_model(out)(pixels(image))['labels'] == labels_of(*tiny_m, image)).mean() > 0.9


def leave_out_normalisation(network: nn.Module) -> None:
    network.data_preprocessor._enable_normalize = False


def swap_channels(network: nn.Module) -> None:
    network.data_preprocessor.channel_conversion = False


def change_one_weight(network: nn.Module) -> None:
    network.backbone.stem[0].conv.weight.data[0, 0, 1, 1] += 1


def flip_align_corners(network: nn.Module) -> None:
    network.align_corners = True


@pytest.mark.parametrize('spoil', [leave_out_normalisation, swap_channels, change_one_weight, flip_align_corners])
@pytest.mark.parametrize('export', [export_coreml, pytest.param(export_onnx, marks=needs_onnx)])
def test_a_broken_export_is_caught(tiny_m, tmp_path, monkeypatch, spoil, export):
    module = coreml if export is export_coreml else onnx_export

    def spoilt(*args: object) -> object:
        source = load_source(*args)
        spoil(source.folded)
        return source

    monkeypatch.setattr(module, 'load_source', spoilt)
    suffix = '.mlpackage' if export is export_coreml else '.onnx'
    options = dict(precision='fp16') if export is export_coreml else {}
    with pytest.raises(UserError, match='The saved model is wrong'):
        export(*tiny_m, out=str(tmp_path / f'a{suffix}'), size=[SIZE], **options)
    assert left_behind(tmp_path) == []


def test_overflow_in_16_bits_is_caught(tiny_m, tmp_path, monkeypatch):
    def enlarge(*args: object) -> object:
        source = load_source(*args)
        for network in (source.original, source.folded):
            network.backbone.stem[2].conv.weight.data *= 1e6
        return source

    monkeypatch.setattr(coreml, 'load_source', enlarge)
    with pytest.raises(UserError, match='--precision fp32'):
        export_coreml(*tiny_m, out=str(tmp_path / 'a.mlpackage'), size=[SIZE])
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(size=[(65, 128)]), ['multiples of 32', '65 x 128', '64 128']),
        (dict(size=[(128, 128), (96, 128)]), ['multiples of 64', '96 x 128']),
        (dict(size=[(128, 128), (128, 128)]), ['twice']),
        (dict(format='neuralnetwork', out='a.mlmodel', size=[(96, 128)]), ['64', '--format mlprogram']),
        (dict(format='neuralnetwork', out='a.mlmodel', target='iOS16'), ['iOS13, iOS14', 'iOS16']),
        (dict(format='neuralnetwork'), ['.mlmodel', 'a.mlpackage']),
        (dict(format='neuralnetwork', out='a.mlmodel', compress='linear8'), ['--format mlprogram']),
        (dict(target='iOS14'), ['iOS15', 'iOS14']),
        (dict(target='iOS15', compress='linear8'), ['iOS16']),
        (dict(precision='fp32', compress='palettize'), ['fp16']),
        (dict(benchmark=True), ['macOS']),
        (dict(images=['nowhere.jpg']), ['nowhere.jpg']),
        (dict(out='taken.mlpackage'), ['taken.mlpackage is there already']),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(tiny_m, tmp_path, options, words):
    (tmp_path / 'taken.mlpackage').mkdir()
    out = str(tmp_path / options.pop('out', 'a.mlpackage'))
    with pytest.raises(UserError) as error:
        export_coreml(*tiny_m, **{'out': out, 'size': [SIZE], **options})
    assert all(word in str(error.value) for word in words), error.value
    assert left_behind(tmp_path) == ['taken.mlpackage']


def test_an_operation_that_is_not_known_is_named(tmp_path):
    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 3, 4, 4))])
    def program(x: object) -> object:
        return mb.cumsum(x=x, axis=1)

    ct.convert(program, convert_to='mlprogram', skip_model_load=True).save(str(tmp_path / 'a.mlpackage'))
    with pytest.raises(UnknownOperation, match='cumsum'):
        open_model(tmp_path / 'a.mlpackage')(np.zeros((1, 3, 4, 4), np.float32))


def test_sixteen_bits_are_rounded_after_every_operation(tmp_path):
    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 3, 4, 4))])
    def program(x: object) -> object:
        return mb.sub(x=mb.add(x=x, y=2048.0), y=2048.0)

    model = ct.convert(program, convert_to='mlprogram', compute_precision=ct.precision.FLOAT16, skip_model_load=True)
    model.save(str(tmp_path / 'a.mlpackage'))
    ((_, result),) = open_model(tmp_path / 'a.mlpackage')(np.full((1, 3, 4, 4), 0.75, np.float32)).items()
    assert (result == 0).all() or (result == 2).all()  # 2048.75 lies between 2048 and 2050


@examples(50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_resizes_by_whole_factors_are_those_of_pytorch(height, width, factor):
    x = torch.arange(2.0 * height * width).reshape(1, 2, height, width)
    scale = (float(factor), float(factor))
    assert torch.equal(resize_nearest(x, scale), F.interpolate(x, scale_factor=factor, mode='nearest'))
    for align in (False, True):
        expected = F.interpolate(x, size=(height * factor, width * factor), mode='bilinear', align_corners=align)
        assert torch.allclose(resize_bilinear(x, scale, align), expected, atol=1e-5)


def test_a_trimmed_mean_leaves_out_the_outermost():
    assert trimmed_mean([1000.0, *[2.0] * 8, -1000.0], 0.2) == 2.0


def test_exporting_changes_nothing_in_the_model(tiny_m):
    source = load_source(*tiny_m, 'all')
    before = {key: tensor.clone() for key, tensor in source.folded.state_dict().items()}
    modules = [type(module) for module in source.folded.modules()]
    capture(ExportedSegmentor(source.folded), (128, 192), onnx_export.any_size())
    assert [type(module) for module in source.folded.modules()] == modules
    after = source.folded.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.fixture(scope='module')
def any_onnx(tiny, tmp_path_factory) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A tiny segmentor for batches of any size, in onnxruntime."""
    onnxruntime = pytest.importorskip('onnxruntime')
    out = tmp_path_factory.mktemp('onnx') / 'tiny.onnx'
    table = export_onnx(*tiny, out=str(out), output='both', benchmark=True, cfg_options=dict(crop_size=(128, 160)))
    assert 'onnxruntime' in table and 'PyTorch' in table and '100.000 %' in table
    session = onnxruntime.InferenceSession(str(out), providers=['CPUExecutionProvider'])
    assert session.get_modelmeta().custom_metadata_map['config'] == 'tiny'
    return lambda image: session.run(['labels', 'logits'], dict(image=image))


@pytest.mark.parametrize('size', [(96, 96), (96, 224), (160, 128), (256, 320)])
def test_one_onnx_file_takes_batches_of_any_size(tiny, any_onnx, size):
    images = [picture(size, seed) for seed in range(3)]
    labels, logits = any_onnx(np.concatenate([pixels(image) for image in images]))
    assert logits.shape == (3, 150, size[0] // 4, size[1] // 4)
    for image, found in zip(images, labels):
        assert np.array_equal(found, labels_of(*tiny, image))


@needs_onnx
@pytest.mark.parametrize('part', ['segmentor', 'backbone'])
def test_onnx_of_one_size(tiny, tmp_path, part):
    table = export_onnx(*tiny, out=str(tmp_path / 'a.onnx'), part=part, size=[(96, 160)])
    assert '96 x 160' in table and left_behind(tmp_path) == ['a.onnx']
    assert ('100.000 %' if part == 'segmentor' else 'largest feature') in table


def test_onnx_says_what_is_missing(tiny_m, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, 'PACKAGES', ('onnx', 'no_such_package'))
    with pytest.raises(UserError, match='pip install no_such_package'):
        export_onnx(*tiny_m, out=str(tmp_path / 'a.onnx'))


@pytest.mark.parametrize(
    ('arch', 'tool', 'name', 'options'),
    [
        ('m3', 'export_coreml', 'a.mlpackage', ['--precision', 'fp16']),
        ('m3', 'export_coreml', 'a.mlmodel', ['--precision', 'fp32', '--format', 'neuralnetwork']),
        ('a3', 'export_coreml', 'a.mlpackage', ['--precision', 'fp32']),
        pytest.param('m3', 'export_onnx', 'a.onnx', [], marks=needs_onnx),
    ],
)
def test_released_variants_on_real_images(arch, tool, name, options, real_m3, formula_weights, ade20k_sample, tmp_path):
    checkpoint = real_m3
    if arch != 'm3':
        checkpoint = tmp_path / 'released.pth'
        torch.save(
            dict(state_dict=formula_weights(read_layout(f'recnext_{arch}_ade20k')['tensors']), meta={}), checkpoint
        )
    images = sorted((ade20k_sample / 'images' / 'validation').glob('*.jpg'))
    out = tmp_path / 'made' / name
    result = run_tool(
        tool, config_of(arch), checkpoint, '--out', out, '--size', 128, 192, *options, '--images', *images
    )
    assert result.returncode == 0, result.stderr
    assert '3 images (ADE_val_00000001.jpg, ...)' in result.stdout
    assert '99.9' in result.stdout if 'fp16' in options else '100.000 % of 73728 labels equal' in result.stdout
    assert left_behind(out.parent) == [name]


def test_a_checkpoint_that_does_not_fit(real_m3, tmp_path):
    result = run_tool('export_coreml', config_of('m4'), real_m3, '--out', tmp_path / 'a.mlpackage')
    assert_user_error(result, str(real_m3))
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize('export', [export_coreml, pytest.param(export_onnx, marks=needs_onnx)])
def test_two_classes_told_apart_by_one_map(tiny_m, tmp_path, export):
    config = tmp_path / 'binary.py'
    config.write_text(f"""
_base_ = [{tiny_m[0]!r}]
loss = dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0)
model = dict(decode_head=dict(num_classes=2, out_channels=1, threshold=0.4, loss_decode=loss))
""")
    torch.manual_seed(0)
    segmentor = build_without_weights(load_config(config).model).eval()
    nn.init.normal_(segmentor.decode_head.conv_seg.weight)
    checkpoint = tmp_path / 'binary.pth'
    torch.save(dict(state_dict=segmentor.state_dict(), meta={}), checkpoint)
    out = tmp_path / f'made/a{".mlpackage" if export is export_coreml else ".onnx"}'
    options = dict(precision='fp32') if export is export_coreml else {}
    table = export(str(config), str(checkpoint), out=str(out), size=[SIZE], **options)
    assert '100.000 % of 24576 labels equal' in table
