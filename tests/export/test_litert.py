"""LiteRT: what its interpreter makes of the file is what PyTorch computes, and nothing else passes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.exports import (
    SIZE,
    Exported,
    assert_fall_of_miou_is_refused,
    assert_it_says_what_it_is,
    assert_outputs_are_those_of_pytorch,
    assert_spoilt_input_is_refused,
    export_to,
    left_behind,
    normalise_twice,
    picture,
    pixels,
    swap_channels,
)

from projects.recnext.recnext.export.litert import LitertBackend, module_of, open_model, read_metadata
from projects.recnext.recnext.export.source import load_source
from projects.recnext.recnext.utils.errors import UserError

pytest.importorskip('litert_torch')


@pytest.fixture(scope='module', params=['conv', pytest.param('attn', marks=pytest.mark.full)])
def exported(request, tiny_of, tmp_path_factory) -> Exported:
    """With both outputs; norms folded alone, which is quicker to convert."""
    path, source = tmp_path_factory.mktemp('litert') / 'tiny.tflite', tiny_of(request.param)
    table = export_to(path, LitertBackend(), source, size=[SIZE], output='both', fuse='norms', benchmark=True)
    return Exported(path, table, source)


def test_labels_and_logits_are_those_of_pytorch(exported):
    assert '100.000 %' in exported.table and 'LiteRT' in exported.table and 'CONV_2D' in exported.table
    assert left_behind(exported.path.parent) == ['tiny.tflite']
    assert_outputs_are_those_of_pytorch(open_model(exported.path), exported.source)


def test_the_file_says_what_it_is(exported):
    said = read_metadata(exported.path)
    assert_it_says_what_it_is(said, exported.path)


def test_an_app_gives_it_an_image_with_the_channels_last(exported):
    """As a bitmap has them, and by the names that the file says."""
    from ai_edge_litert.interpreter import Interpreter

    run = Interpreter(str(exported.path)).get_signature_runner()
    assert run.get_input_details()['image']['shape'].tolist() == [1, *SIZE, 3]
    assert read_metadata(exported.path)['layout'] == 'NHWC'
    image = picture(SIZE)
    outputs = run(image=image[None, ..., ::-1].astype(np.float32))
    assert outputs.keys() == {'labels', 'logits'}
    assert np.array_equal(outputs['labels'], open_model(exported.path)(pixels(image))['labels'])


def test_an_image_of_another_size_is_refused(exported):
    with pytest.raises(UserError, match=r'takes images \(1, 3, 64, 128\); found \(1, 3, 128, 64\)'):
        open_model(exported.path)(pixels(picture(SIZE[::-1])))


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / 'a.tflite').write_text('a page')
    with pytest.raises(UserError, match=r'does not take the file: .*Flatbuffer'):
        open_model(tmp_path / 'a.tflite')


def read_planes(image: np.ndarray) -> np.ndarray:
    """What the interpreter sees of an image whose memory lies in planes."""
    return np.ascontiguousarray(image).reshape(1, *image.shape[2:], 3).transpose(0, 3, 1, 2)


@pytest.mark.parametrize('spoil', [swap_channels, normalise_twice, read_planes])
def test_wrong_input_would_not_pass_as_verified(exported, spoil):
    assert_spoilt_input_is_refused(open_model(exported.path), exported.source, spoil)


def kernels_of(path: Path) -> dict[str, set[int]]:
    """The types of the kernels of a file, by the module that they are of."""
    from ai_edge_litert.schema_py_generated import BuiltinOperator
    from ai_edge_litert.tools.flatbuffer_utils import read_model

    model = read_model(str(path))
    graph, kernels = model.subgraphs[0], {}
    for operation in graph.operators:
        code = model.operatorCodes[operation.opcodeIndex].builtinCode
        if code in (BuiltinOperator.CONV_2D, BuiltinOperator.DEPTHWISE_CONV_2D):
            name = graph.tensors[operation.outputs[0]].name.decode()
            kernels.setdefault(module_of(name), set()).add(graph.tensors[operation.inputs[1]].type)
    return kernels


# Two lists of modules have the same numbers in FPN, and one of them alone is kept.
KEPT = ['decode_head.conv_seg', 'backbone.stages.*.token_mixer', 'neck.lateral_convs.*']


@pytest.mark.full
def test_eight_bits_in_all_modules_but_those_that_are_kept(few, photos, tmp_path):
    from ai_edge_litert.schema_py_generated import TensorType

    path = tmp_path / 'a.tflite'
    options = dict(size=[SIZE], output='both', fuse='norms', calibrate=str(photos), keep_float=KEPT)
    table = export_to(path, LitertBackend('int8'), few, **options)
    assert f'kept float    {", ".join(KEPT)}' in table
    kernels = kernels_of(path)
    wrapper = load_source(*few, 'norms').wrap('segmentor', 'labels', single=True)
    assert kernels.keys() == {name for name, module in wrapper.named_modules() if isinstance(module, torch.nn.Conv2d)}
    kept = {name for name, types in kernels.items() if types == {TensorType.FLOAT32}}
    assert {types for types in map(frozenset, kernels.values())} == {
        frozenset([TensorType.FLOAT32]),
        frozenset([TensorType.INT8]),
    }
    expected = ('conv_seg', 'token_mixer', 'lateral_convs')
    assert kept == {name for name in kernels if any(part in name.split('.') for part in expected)} != set()


@pytest.mark.full
@pytest.mark.parametrize('fuse', ['all', 'norms'])
def test_a_file_in_eight_bits_is_within_its_bounds(few, scenes, photos, tmp_path, fuse):
    data = {'test_dataloader.dataset.data_root': str(scenes)}
    path = tmp_path / 'a.tflite'
    table = export_to(
        path, LitertBackend('int8'), few, data, size=[SIZE], fuse=fuse, calibrate=str(photos), max_drop=100
    )
    rows = dict(line.split(maxsplit=1) for line in table.splitlines() if not line.startswith('kept'))
    assert rows['calibrated'].startswith(f'with 4 of 4 images of {photos}; few')
    assert rows['precision'].startswith('int8') and 'points' in rows['mIoU'] and left_behind(tmp_path) == ['a.tflite']
    assert_fall_of_miou_is_refused(open_model(path), few)


@pytest.mark.full
def test_weights_in_sixteen_bits(few, tmp_path):
    from ai_edge_litert.schema_py_generated import TensorType

    table = export_to(tmp_path / 'a.tflite', LitertBackend('fp16'), few, size=[SIZE], fuse='norms')
    assert 'weights fp16, computed in fp32' in table and 'DEQUANTIZE' in table
    # The scores are not turned round before the argmax.
    assert 'TRANSPOSE' not in table
    tensors = open_tensors(tmp_path / 'a.tflite')
    assert sum(size for kind, size in tensors if kind == TensorType.FLOAT16) > 10 * sum(
        size for kind, size in tensors if kind == TensorType.FLOAT32
    )


def open_tensors(path: Path) -> list[tuple[int, int]]:
    """Type and number of bytes of the constants of a file."""
    from ai_edge_litert.tools.flatbuffer_utils import read_model

    model = read_model(str(path))
    buffers = ((tensor.type, model.buffers[tensor.buffer].data) for tensor in model.subgraphs[0].tensors)
    return [(kind, len(data)) for kind, data in buffers if data is not None]


@pytest.mark.full
@pytest.mark.parametrize('part', ['segmentor', 'backbone'])
def test_semantic_fpn_folded_and_the_backbone(tiny, tmp_path, part):
    table = export_to(tmp_path / 'a.tflite', LitertBackend(), tiny, size=[SIZE], part=part)
    assert ('100.000 %' if part == 'segmentor' else 'largest feature') in table


@pytest.mark.full
def test_the_backbone_in_eight_bits_with_a_stage_kept(few, photos, tmp_path):
    """What a kept stage gives is an output, and goes on to one in 8 bits."""
    options = dict(size=[SIZE], part='backbone', calibrate=str(photos), keep_float=['backbone.stages.1'])
    assert 'largest feature' in export_to(tmp_path / 'a.tflite', LitertBackend('int8'), few, **options)


def test_one_size_and_a_name_that_says_what_it_is(tiny, tmp_path):
    with pytest.raises(UserError, match='one fixed size'):
        export_to(tmp_path / 'a.tflite', LitertBackend(), tiny, size=[(64, 64), (96, 96)])
    with pytest.raises(UserError, match=r'ends in \.tflite'):
        export_to(tmp_path / 'a.onnx', LitertBackend(), tiny, size=[SIZE])
    assert left_behind(tmp_path) == []


def test_says_what_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *_: None)
    with pytest.raises(UserError, match='pip install "litert-torch'):
        export_to(tmp_path / 'a.tflite', LitertBackend(), tiny, size=[SIZE])
