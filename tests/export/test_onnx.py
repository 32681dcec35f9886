"""ONNX: what onnxruntime makes of the file is what PyTorch computes, for batches of any size or images of one."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from helpers.exports import export_to, left_behind, picture, pixels, scores_of
from helpers.reference import ROOT

from projects.recnext.recnext.export import onnx as onnx_export
from projects.recnext.recnext.export.onnx import OnnxBackend
from projects.recnext.recnext.utils.errors import UserError


@pytest.fixture(scope='module', params=['conv', 'attn'])
def mixer(request) -> str:
    return request.param


@pytest.fixture(scope='module')
def any_onnx(tiny_of, mixer, tmp_path_factory) -> Callable[[np.ndarray], list[np.ndarray]]:
    """A tiny segmentor for batches of any size, in onnxruntime."""
    import onnxruntime

    tiny = tiny_of(mixer)

    out = tmp_path_factory.mktemp('onnx') / 'tiny.onnx'
    table = export_to(out, OnnxBackend(), tiny, dict(crop_size=(128, 160)), output='both')
    assert '100.000 %' in table
    session = onnxruntime.InferenceSession(str(out), providers=['CPUExecutionProvider'])
    assert session.get_modelmeta().custom_metadata_map['config'] == 'tiny'
    return lambda image: session.run(['labels', 'logits'], dict(image=image))


@pytest.mark.full
@pytest.mark.parametrize('size', [(96, 96), (96, 224), (160, 128), (256, 320)])
def test_one_onnx_file_takes_batches_of_any_size(tiny_of, mixer, any_onnx, size):
    images = [picture(size, seed) for seed in range(3)]
    labels, logits = any_onnx(np.concatenate([pixels(image) for image in images]))
    assert logits.shape == (3, 150, size[0] // 4, size[1] // 4)
    for image, found in zip(images, labels):
        scores = scores_of(tiny_of(mixer), image)
        behind = scores.max(0) - np.take_along_axis(scores, found[None], 0)[0]
        # Which of two classes wins that are level depends on the order in which a machine adds.
        assert behind.max() <= 1e-6 * np.abs(scores).max() and (behind > 0).sum() <= 2


@pytest.mark.parametrize(
    ('mixer', 'part'),
    [
        ('conv', 'backbone'),
        pytest.param('conv', 'segmentor', marks=pytest.mark.full),
        pytest.param('attn', 'segmentor', marks=pytest.mark.full),
        pytest.param('attn', 'backbone', marks=pytest.mark.full),
    ],
)
def test_onnx_of_one_size(tiny_of, tmp_path, mixer, part):
    tiny = tiny_of(mixer)
    table = export_to(
        tmp_path / 'a.onnx', OnnxBackend(), tiny, part=part, size=[(64, 96)], benchmark=part == 'backbone'
    )
    assert ('onnxruntime' in table and 'PyTorch' in table) == (part == 'backbone')
    assert '64 x 96' in table and left_behind(tmp_path) == ['a.onnx']
    # Nor where it was made.
    assert str(ROOT).encode() not in (tmp_path / 'a.onnx').read_bytes()
    if part == 'segmentor':
        # The exporter refuses what rounding does not explain; which of two level classes wins depends on the machine.
        assert float(re.search(r'([\d.]+) % of \d+ labels equal', table)[1]) >= 99.9
    else:
        assert 'largest feature' in table


def test_a_backbone_for_batches_of_any_size(tiny, tmp_path):
    table = export_to(tmp_path / 'a.onnx', OnnxBackend(), tiny, dict(crop_size=(96, 96)), part='backbone')
    assert 'batches of any size' in table and 'largest feature' in table


def test_onnx_says_what_is_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, 'PACKAGES', ('onnx', 'no_such_package'))
    with pytest.raises(UserError, match='pip install no_such_package'):
        export_to(tmp_path / 'a.onnx', OnnxBackend(), tiny)


def test_onnx_has_one_size_or_any(tiny, tmp_path):
    with pytest.raises(UserError, match='one fixed size'):
        export_to(tmp_path / 'a.onnx', OnnxBackend(), tiny, size=[(64, 64), (96, 96)])
    assert left_behind(tmp_path) == []
