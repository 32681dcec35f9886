"""Eight bits: calibrated on the images that are named, in the modules that are not kept, refused where they lose."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.exports import SIZE, assert_fall_of_miou_is_refused, export_to, left_behind, picture

from projects.recnext.recnext.export.backend import ExportOptions
from projects.recnext.recnext.export.coreml import CoreMLBackend
from projects.recnext.recnext.export.coreml_program import ProgramEvaluator
from projects.recnext.recnext.export.images import find_images
from projects.recnext.recnext.export.onnx import OnnxBackend, open_session
from projects.recnext.recnext.export.onnx_rounding import quantize
from projects.recnext.recnext.export.quantization import DRAWN, find_calibration
from projects.recnext.recnext.export.sizes import ImageSizes
from projects.recnext.recnext.export.source import Source, load_source
from projects.recnext.recnext.runtimes.calibration import NUMBER, Calibration
from projects.recnext.recnext.utils.errors import UserError

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def source(few) -> Source:
    return load_source(*few, 'all')


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """A folder of four pictures, one of them in a folder of its own, and a file that is none."""
    folder = tmp_path_factory.mktemp('photos')
    (folder / 'more').mkdir()
    (folder / 'read.txt').write_text('not an image')
    for seed in range(4):
        cv2.imwrite(str(folder / ('more' if seed else '.') / f'{seed}.png'), picture((80, 96), 20 + seed))
    return folder


@pytest.fixture(scope='module')
def calibrate(source, photos) -> Callable[..., Calibration]:
    def make(*keep_float: str, folder: Path | None = photos, part: str = 'segmentor') -> Calibration:
        options = ExportOptions(part=part, calibrate=folder and str(folder), keep_float=keep_float)
        return find_calibration(source, source.wrap(part, 'labels', single=False), options, SIZE)

    return make


@pytest.fixture(scope='module')
def plain(source) -> object:
    """The segmentor in ONNX, in floating point."""
    return OnnxBackend().convert(source.wrap('segmentor', 'labels', single=False), ImageSizes([SIZE]), source).proto


def quantized_kernels(model: object) -> dict[str, bool]:
    """Of each convolution, by its kernel, whether that is dequantized from integers."""
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    return {
        node.input[1].removesuffix('_DequantizeLinear_Output'): made.get(node.input[1]) == 'DequantizeLinear'
        for node in model.graph.node
        if node.op_type == 'Conv'
    }


@pytest.mark.parametrize(
    'backend',
    [OnnxBackend('int8'), pytest.param(CoreMLBackend(precision='int8'), marks=pytest.mark.full)],
    ids=['onnx', 'coreml'],
)
def test_a_calibrated_file_is_within_its_bounds(few, scenes, photos, tmp_path, backend):
    data = {'test_dataloader.dataset.data_root': str(scenes)}
    options = dict(size=[SIZE], calibrate=str(photos), keep_float=['decode_head.conv_seg'], max_drop=100)
    table = export_to(tmp_path / f'a{backend.suffix}', backend, few, data, **options)
    rows = dict(line.split(maxsplit=1) for line in table.splitlines() if not line.startswith('kept'))
    assert rows['calibrated'].startswith(f'with 4 of 4 images of {photos}; few')
    assert 'kept float    decode_head.conv_seg' in table and rows['precision'].startswith('int8')
    # Three scenes with annotations, from which these weights have learned nothing.
    assert '3 images' in rows['verified'] and rows['mIoU'].startswith('PyTorch ') and 'points' in rows['mIoU']
    assert left_behind(tmp_path) == [f'a{backend.suffix}']


@pytest.mark.full
def test_half_the_bits_of_the_weights(few, tmp_path):
    table = export_to(tmp_path / 'a.onnx', OnnxBackend('fp16'), few, size=[SIZE])
    model = onnx.load(tmp_path / 'a.onnx')
    kinds = {
        onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in model.graph.initializer if len(tensor.dims) == 4
    }
    assert kinds == {'FLOAT16'} and 'calibrated' not in table and 'mIoU' not in table


@pytest.mark.parametrize(
    ('patterns', 'kept'),
    [
        (['decode_head.conv_seg'], ['decode_head.conv_seg']),
        (
            ['backbone.stages.*.token_mixer'],
            ['backbone.stages.0.blocks.0.token_mixer.convs.0', 'backbone.stages.1.downsample.token_mixer'],
        ),
        (
            ['neck.levels.0.*', 'decode_head'],
            ['neck.levels.0.direct', 'neck.levels.0.sides.0.0', 'decode_head.scale_heads.3.0.conv'],
        ),
    ],
)
def test_what_is_kept_stays_in_floating_point(plain, calibrate, patterns, kept):
    kernels = quantized_kernels(quantize(copy.deepcopy(plain), calibrate(*patterns)))
    assert all(not kernels[f'segmentor.{name}.weight'] for name in kept)
    others = [name for name in kernels if not calibrate(*patterns).keeps(name.removesuffix('.weight'))]
    assert others and all(kernels[name] for name in others) and len(others) < len(kernels)


def test_the_same_images_give_the_same_file(plain, calibrate):
    first, second = (quantize(copy.deepcopy(plain), calibrate()).SerializeToString() for _ in range(2))
    assert first == second
    other = quantize(copy.deepcopy(plain), replace(calibrate(), images=calibrate().images[:1]))
    assert first != other.SerializeToString()


def test_a_fall_of_miou_is_refused(few, plain, calibrate, tmp_path):
    onnx.save(quantize(copy.deepcopy(plain), calibrate()), tmp_path / 'a.onnx')
    assert_fall_of_miou_is_refused(open_session(tmp_path / 'a.onnx'), few)


def test_calibration_images_that_are_not_there(calibrate, tmp_path):
    with pytest.raises(UserError, match='takes a folder of images'):
        calibrate(folder=tmp_path / 'nowhere')
    (tmp_path / 'read.txt').write_text('no image')
    with pytest.raises(UserError, match='holds no images'):
        calibrate(folder=tmp_path)
    (tmp_path / 'a.jpg').write_bytes(b'no image either')
    with pytest.raises(UserError, match=r'a\.jpg is not an image'):
        list(calibrate(folder=tmp_path))


def test_a_pattern_that_fits_no_module(calibrate):
    with pytest.raises(UserError, match=r'conv_sag: no module .* nearest: decode_head.conv_seg'):
        calibrate('decode_head.conv_sag')


def test_where_calibration_images_come_from(source, calibrate, scenes, photos):
    inputs = list(calibrate())
    assert {image.shape for image in inputs} == {(1, 3, *SIZE)} and inputs[0].dtype == np.float32
    expected = cv2.resize(cv2.imread(str(calibrate().images[0])), SIZE[::-1])[..., ::-1].transpose(2, 0, 1)
    assert (inputs[0][0] == expected).all()  # RGB, from 0 to 255
    assert abs(next(iter(calibrate(part='backbone')))).max() < 5  # normalised
    drawn = calibrate(folder=None)
    assert drawn.images == DRAWN and 'drawn scenes' in str(drawn)
    cfg = copy.deepcopy(source.cfg)
    cfg.train_dataloader.dataset.data_root = str(scenes)
    found = find_calibration(source._replace(cfg=cfg), source.wrap('segmentor', 'labels', False), ExportOptions(), SIZE)
    assert str(found).startswith('8 of 8 images of the training set') and len(found) < NUMBER
    cfg.pop('train_dataloader')
    found = find_calibration(source._replace(cfg=cfg), source.wrap('segmentor', 'labels', False), ExportOptions(), SIZE)
    assert found.images == DRAWN


def test_annotations_belong_to_the_images_of_the_test_set(source, scenes, photos):
    cfg = copy.deepcopy(source.cfg)
    cfg.test_dataloader.dataset.data_root = str(scenes)
    images = find_images(cfg, None, annotated=True)
    stored = sorted((scenes / 'annotations' / 'validation').glob('*.png'))
    assert len(images.annotations) == len(images.images) == len(stored)
    expected = cv2.imread(str(stored[0]), cv2.IMREAD_UNCHANGED).astype(np.uint8) - np.uint8(1)  # ADE20K's 0 is ignored
    assert (images.annotations[0] == expected).all()
    paths = [str(path) for path in sorted((scenes / 'images' / 'validation').iterdir())[1:2]]
    assert (find_images(cfg, paths, annotated=True).annotations[0] == images.annotations[1]).all()
    assert find_images(cfg, [*paths, str(photos / '0.png')], annotated=True).annotations == ()
    cfg.pop('test_dataloader')
    assert [len(find_images(cfg, given, annotated=True).images) for given in (paths, None)] == [1, 3]


@pytest.mark.parametrize('zero_point', [None, 3])
@pytest.mark.parametrize('axis', [None, 1])
def test_the_evaluator_rounds_as_pytorch_does(zero_point, axis):
    torch.manual_seed(0)
    x, scale = torch.randn(2, 3, 4, 5) * 40, torch.tensor([0.2, 0.3, 0.1]) if axis else torch.tensor(0.2)
    offset = torch.full_like(scale, zero_point or 0)
    given = None if zero_point is None else offset.to(torch.int8)
    rounded = ProgramEvaluator.op_quantize(None, x, scale, 'int8', given, axis)
    found = ProgramEvaluator.op_dequantize(None, rounded, scale, given, axis)
    if axis:
        expected = torch.fake_quantize_per_channel_affine(x, scale, offset.int(), axis, -128, 127)
    else:
        expected = torch.fake_quantize_per_tensor_affine(x, float(scale), int(offset), -128, 127)
    assert rounded.dtype == torch.int8 and torch.allclose(found, expected, atol=1e-5)
