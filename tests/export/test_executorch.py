"""ExecuTorch: what its runtime makes of the file is what PyTorch computes, and nothing else passes."""

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
    labels_of,
    left_behind,
    normalise_twice,
    picture,
    pixels,
    swap_channels,
)

from projects.recnext.recnext.export import executorch as executorch_export
from projects.recnext.recnext.export.backend import ExportOptions
from projects.recnext.recnext.export.executorch import (
    ExecutorchBackend,
    open_program,
    quantize,
    read_metadata,
    read_plan,
)
from projects.recnext.recnext.export.quantization import find_calibration
from projects.recnext.recnext.export.source import load_source
from projects.recnext.recnext.runtimes.capture import capture, modules_of
from projects.recnext.recnext.utils.errors import UserError

pytest.importorskip('executorch')


@pytest.fixture(scope='module', params=['conv', pytest.param('attn', marks=pytest.mark.full)])
def exported(request, tiny_of, tmp_path_factory) -> Exported:
    """With both outputs; norms folded alone, which is quicker to lower."""
    path, source = tmp_path_factory.mktemp('executorch') / 'tiny.pte', tiny_of(request.param)
    table = export_to(path, ExecutorchBackend(), source, size=[SIZE], output='both', fuse='norms', benchmark=True)
    return Exported(path, table, source)


def test_labels_and_logits_are_those_of_pytorch(exported):
    assert '100.000 %' in exported.table and 'ExecuTorch' in exported.table
    assert left_behind(exported.path.parent) == ['tiny.pte']
    assert_outputs_are_those_of_pytorch(open_program(exported.path), exported.source)
    assert dimension_of_argmax(exported.path) in (-1, 3)  # in the order in which XNNPACK leaves the scores


def dimension_of_argmax(path: Path) -> int:
    plan = read_plan(path)
    calls = [instruction.instr_args for chain in plan.chains for instruction in chain.instructions]
    (argmax,) = (
        call for call in calls if hasattr(call, 'op_index') and plan.operators[call.op_index].name == 'aten::argmax'
    )
    return plan.values[argmax.args[1]].val.int_val


def test_the_file_says_what_it_is(exported):
    from executorch.runtime import Runtime

    said = read_metadata(Runtime.get().load_program(exported.path))
    assert_it_says_what_it_is(said, exported.path)


def test_an_image_of_another_size_is_refused(exported):
    with pytest.raises(UserError, match=r'takes images \(1, 3, 64, 128\); found \(1, 3, 128, 64\)'):
        open_program(exported.path)(pixels(picture(SIZE[::-1])))


def read_channels_last(image: np.ndarray) -> np.ndarray:
    """What the runtime sees of an image whose memory lies in another order."""
    return np.ascontiguousarray(image.transpose(0, 2, 3, 1)).reshape(image.shape)


@pytest.mark.parametrize('spoil', [swap_channels, normalise_twice, read_channels_last])
def test_wrong_input_would_not_pass_as_verified(exported, spoil):
    assert_spoilt_input_is_refused(open_program(exported.path), exported.source, spoil)


KEPT = ['decode_head.conv_seg', 'backbone.stages.*.token_mixer']


def test_eight_bits_in_all_modules_but_those_that_are_kept(few, photos):
    """What is lowered: its kernels, and its labels as PyTorch computes them."""
    source = load_source(*few, 'norms')
    wrapper = source.wrap('segmentor', 'labels', single=True)
    options = ExportOptions(calibrate=str(photos), keep_float=KEPT)
    calibration = find_calibration(source, wrapper, options, SIZE)
    program = quantize(capture(wrapper, SIZE), calibration)
    kernels = {
        modules_of(node)[-1]: 'dequantize_per_channel' in str(node.args[1].target)
        for node in program.graph.nodes
        if node.target == torch.ops.aten.conv2d.default
    }
    convs = {name for name, module in wrapper.named_modules() if isinstance(module, torch.nn.Conv2d)}
    kept = {name for name in kernels if calibration.keeps(name)}
    assert kernels.keys() == convs
    assert 'segmentor.decode_head.conv_seg' in kept and 'segmentor.backbone.stages.1.downsample.token_mixer' in kept
    assert {name for name, quantized in kernels.items() if not quantized} == kept
    labels = program.module()(torch.from_numpy(pixels(picture(SIZE))))[0]
    assert (labels.numpy() == labels_of(few, picture(SIZE))).mean() > 0.95


@pytest.mark.full
def test_a_file_in_eight_bits_is_within_its_bounds(few, scenes, photos, tmp_path):
    data = {'test_dataloader.dataset.data_root': str(scenes)}
    path = tmp_path / 'a.pte'
    options = dict(size=[SIZE], fuse='norms', calibrate=str(photos), max_drop=100)
    table = export_to(path, ExecutorchBackend('int8'), few, data, **options)
    rows = dict(line.split(maxsplit=1) for line in table.splitlines() if not line.startswith('kept'))
    assert rows['calibrated'].startswith(f'with 4 of 4 images of {photos}; few')
    assert rows['precision'].startswith('int8') and 'points' in rows['mIoU'] and left_behind(tmp_path) == ['a.pte']
    assert_fall_of_miou_is_refused(open_program(path), few)


def test_semantic_fpn_folded_is_refused_in_eight_bits(few, photos, tmp_path):
    with pytest.raises(UserError, match='--fuse norms'):
        export_to(tmp_path / 'a.pte', ExecutorchBackend('int8'), few, size=[SIZE], calibrate=str(photos))
    assert left_behind(tmp_path) == []


@pytest.mark.full
def test_a_file_that_does_not_run_is_refused(few, photos, tmp_path, monkeypatch):
    """Once this fails, ExecuTorch is mended, and what the test above is about can go."""
    monkeypatch.setattr(executorch_export, 'FoldedLevel', bytes)
    with pytest.raises(UserError, match=r'does not execute the file: .*0x10'):
        export_to(tmp_path / 'a.pte', ExecutorchBackend('int8'), few, size=[SIZE], calibrate=str(photos))
    assert left_behind(tmp_path) == []


@pytest.mark.full
@pytest.mark.parametrize('part', ['segmentor', 'backbone'])
def test_semantic_fpn_folded_and_the_backbone(tiny, tmp_path, part):
    table = export_to(tmp_path / 'a.pte', ExecutorchBackend(), tiny, size=[SIZE], part=part)
    assert ('100.000 %' if part == 'segmentor' else 'largest feature') in table


def test_one_size_and_a_name_that_says_what_it_is(tiny, tmp_path):
    with pytest.raises(UserError, match='one fixed size'):
        export_to(tmp_path / 'a.pte', ExecutorchBackend(), tiny, size=[(64, 64), (96, 96)])
    with pytest.raises(UserError, match=r'ends in \.pte'):
        export_to(tmp_path / 'a.onnx', ExecutorchBackend(), tiny, size=[SIZE])
    assert left_behind(tmp_path) == []


def test_says_what_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *_: None)
    with pytest.raises(UserError, match='pip install "executorch'):
        export_to(tmp_path / 'a.pte', ExecutorchBackend(), tiny, size=[SIZE])
