"""Exports that are broken on purpose, for every format and precision: all of them are refused, and nothing is left."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.exports import SIZE, export_to, left_behind, picture, pixels
from torch import nn

from projects.recnext.recnext.export import exporter
from projects.recnext.recnext.export.backend import Backend, OfPrecision
from projects.recnext.recnext.export.coreml import CoreMLBackend
from projects.recnext.recnext.export.executorch import ExecutorchBackend
from projects.recnext.recnext.export.litert import LitertBackend
from projects.recnext.recnext.export.onnx import OnnxBackend
from projects.recnext.recnext.export.source import load_source
from projects.recnext.recnext.runtimes.calibration import Calibration
from projects.recnext.recnext.utils.errors import UserError
from projects.recnext.recnext.web import runtime
from projects.recnext.recnext.web.static_page import WebBackend

BACKENDS: dict[str, Callable[[str], OfPrecision]] = dict(
    onnx=OnnxBackend,
    coreml=lambda precision: CoreMLBackend(precision=precision),
    executorch=ExecutorchBackend,
    litert=LitertBackend,
    web=WebBackend,
)

NEEDS = dict(executorch='executorch', litert='litert_torch')
"""Packages that are not always there."""


def leave_out_normalisation(network: nn.Module) -> None:
    network.data_preprocessor._enable_normalize = False


def swap_channels(network: nn.Module) -> None:
    network.data_preprocessor.channel_conversion = False


def change_one_weight(network: nn.Module) -> None:
    network.backbone.stem[0].conv.weight.data[0, 0, 1, 1] += 1


def flip_align_corners(network: nn.Module) -> None:
    network.align_corners = True


CASES = [
    *((precision, spoil) for precision in ('fp32', 'int8') for spoil in (leave_out_normalisation, swap_channels)),
    *(('fp32', spoil) for spoil in (change_one_weight, flip_align_corners)),
]
"""In 8 bits, one weight more or less is within what rounding does."""

QUICK = {('onnx', 'fp32', leave_out_normalisation)}


def backend_of(name: str, precision: str) -> Backend:
    """A format; the test is skipped where it cannot be made."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    if name == 'web':
        try:
            runtime.find_package()
        except UserError as error:
            pytest.skip(f'needs {runtime.PACKAGE} {runtime.VERSION}, from the cache or by npm: {error}')
    return BACKENDS[name](precision)


def options_of(precision: str, photos: Path) -> dict:
    """Norms folded alone: what ExecuTorch takes in 8 bits, and the quickest to convert."""
    options = dict(size=[SIZE], fuse='norms')
    return options | dict(calibrate=str(photos)) if precision == 'int8' else options


@pytest.mark.parametrize(
    ('name', 'precision', 'spoil'),
    [
        pytest.param(name, *case, marks=() if (name, *case) in QUICK else pytest.mark.full)
        for name in BACKENDS
        for case in CASES
    ],
)
def test_a_network_that_is_not_the_checkpoint_s(few, photos, tmp_path, monkeypatch, name, precision, spoil):
    backend = backend_of(name, precision)

    def spoilt(*args: object) -> object:
        source = load_source(*args)
        spoil(source.folded)
        return source

    monkeypatch.setattr(exporter, 'load_source', spoilt)
    with pytest.raises(UserError, match='The saved model is wrong'):
        export_to(tmp_path / f'a{backend.suffix}', backend, few, **options_of(precision, photos))
    assert left_behind(tmp_path) == []


@pytest.mark.full
@pytest.mark.parametrize('name', BACKENDS)
def test_a_clipped_scale(few, photos, tmp_path, monkeypatch, name):
    """Of every map: the ranges are those of images that are grey all over."""
    backend = backend_of(name, 'int8')
    find_calibration = exporter.find_calibration

    def greyed(*args: object) -> Calibration:
        calibration = find_calibration(*args)
        return replace(calibration, load=lambda image: np.full_like(calibration.load(image), 116))

    monkeypatch.setattr(exporter, 'find_calibration', greyed)
    with pytest.raises(UserError, match='The saved model is wrong'):
        export_to(tmp_path / f'a{backend.suffix}', backend, few, **options_of('int8', photos))
    assert left_behind(tmp_path) == []


@pytest.mark.full
@pytest.mark.parametrize('name', BACKENDS)
@pytest.mark.parametrize('precision', ['fp32', 'int8'])
def test_an_image_whose_memory_lies_otherwise(few, photos, tmp_path, name, precision):
    """Channels last, an array is the same image, and so are its labels; unharmed, the export is not refused."""
    backend = backend_of(name, precision)
    path = tmp_path / f'a{backend.suffix}'
    export_to(path, backend, few, **options_of(precision, photos))
    predict, image = backend.read(path).predict, pixels(picture(SIZE))
    last = torch.from_numpy(image).to(memory_format=torch.channels_last).numpy()
    assert not last.flags.c_contiguous
    assert np.array_equal(predict(last)['labels'], predict(image)['labels'])
