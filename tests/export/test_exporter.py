"""The steps that all formats share: what is wrong is caught, what is told is true, and the model stays as it was."""

import pytest
import torch
from helpers.exports import SIZE, export_to, left_behind
from helpers.reference import config_of, read_layout
from helpers.tools import assert_user_error, run_tool
from torch import nn

from projects.recnext.recnext.export.capture import ExportedSegmentor
from projects.recnext.recnext.export.coreml import CoreMLBackend
from projects.recnext.recnext.export.exporter import count_multiply_adds
from projects.recnext.recnext.export.onnx import OnnxBackend
from projects.recnext.recnext.export.source import load_source
from projects.recnext.recnext.openmmlab.builder import build_without_weights
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.runtimes.capture import capture


def test_exporting_changes_nothing_in_the_model(tiny):
    source = load_source(*tiny, 'all')
    before = {key: tensor.clone() for key, tensor in source.folded.state_dict().items()}
    modules = [type(module) for module in source.folded.modules()]
    capture(ExportedSegmentor(source.folded), SIZE, None)
    assert [type(module) for module in source.folded.modules()] == modules
    after = source.folded.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_multiply_adds_are_those_of_the_convolutions(tiny):
    wrapper, expected = load_source(*tiny, 'all').wrap('segmentor', 'labels', single=True), []

    def count(conv: nn.Conv2d, inputs: tuple, out: torch.Tensor) -> None:
        expected.append(out.numel() * conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1])

    for module in wrapper.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    found = count_multiply_adds(wrapper, SIZE)
    assert found > 0 and found == sum(expected)


@pytest.mark.full
@pytest.mark.parametrize(
    ('arch', 'tool', 'name', 'options'),
    [
        ('m3', 'export_coreml', 'a.mlpackage', ['--precision', 'fp16']),
        ('m3', 'export_coreml', 'a.mlmodel', ['--precision', 'fp32', '--format', 'neuralnetwork']),
        ('a3', 'export_coreml', 'a.mlpackage', ['--precision', 'fp32']),
        ('m3', 'export_onnx', 'a.onnx', []),
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


@pytest.mark.full
@pytest.mark.parametrize(
    'backend',
    [OnnxBackend(), CoreMLBackend(precision='fp32')],
    ids=['onnx', 'coreml'],
)
def test_two_classes_told_apart_by_one_map(tiny, tmp_path, backend):
    config = tmp_path / 'binary.py'
    config.write_text(f"""
_base_ = [{tiny[0]!r}]
loss = dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0)
model = dict(decode_head=dict(num_classes=2, out_channels=1, threshold=0.4, loss_decode=loss))
""")
    torch.manual_seed(0)
    segmentor = build_without_weights(load_config(config).model).eval()
    nn.init.normal_(segmentor.decode_head.conv_seg.weight)
    checkpoint = tmp_path / 'binary.pth'
    torch.save(dict(state_dict=segmentor.state_dict(), meta={}), checkpoint)
    table = export_to(tmp_path / f'made/a{backend.suffix}', backend, (str(config), str(checkpoint)), size=[SIZE])
    assert '100.000 % of 24576 labels equal' in table
