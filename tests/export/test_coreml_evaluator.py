"""Core ML models executed without Core ML: as the format says, rounding included, or not at all."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.strength import examples
from hypothesis import given
from hypothesis import strategies as st

from projects.recnext.recnext.export.coreml import open_model
from projects.recnext.recnext.export.coreml_evaluator import UnknownOperation, resize_bilinear, resize_nearest

ct = pytest.importorskip('coremltools')
mb = pytest.importorskip('coremltools.converters.mil').Builder


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
