"""ExecuTorch: what its runtime makes of the file is what PyTorch computes, and nothing else passes."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.exports import SIZE, export_to, left_behind, picture, pixels, scores_of
from helpers.reference import ROOT

from projects.recnext.recnext.export import exporter
from projects.recnext.recnext.export.executorch import ExecutorchBackend, open_program, read_metadata
from projects.recnext.recnext.export.images import find_images
from projects.recnext.recnext.export.source import load_source
from projects.recnext.recnext.export.verification import Model, verify
from projects.recnext.recnext.utils.errors import UserError

pytest.importorskip('executorch')


class Exported(NamedTuple):
    """A tiny segmentor as a file, and its source."""

    path: Path
    table: str
    source: tuple[str, str]


@pytest.fixture(scope='module', params=['conv', pytest.param('attn', marks=pytest.mark.full)])
def exported(request, tiny_of, tmp_path_factory) -> Exported:
    """With both outputs; norms folded alone, which is quicker to lower."""
    path, source = tmp_path_factory.mktemp('executorch') / 'tiny.pte', tiny_of(request.param)
    table = export_to(path, ExecutorchBackend(), source, size=[SIZE], output='both', fuse='norms', benchmark=True)
    return Exported(path, table, source)


def test_labels_and_logits_are_those_of_pytorch(exported):
    assert '100.000 %' in exported.table and 'ExecuTorch' in exported.table
    assert left_behind(exported.path.parent) == ['tiny.pte']
    image = picture(SIZE)
    outputs = open_program(exported.path)(pixels(image))
    assert outputs['labels'].shape == SIZE and outputs['labels'].dtype == np.int32
    assert outputs['logits'].shape == (1, 150, SIZE[0] // 4, SIZE[1] // 4)
    scores = scores_of(exported.source, image)
    behind = scores.max(0) - np.take_along_axis(scores, outputs['labels'][None].astype(np.int64), 0)[0]
    assert behind.max() <= 1e-5 * np.abs(scores).max()


def test_the_file_says_what_it_is(exported):
    from executorch.runtime import Runtime

    said = read_metadata(Runtime.get().load_program(exported.path))
    assert (said['height'], said['width'], said['outputs']) == (*SIZE, ['labels', 'logits'])
    assert len(said['classes']) == len(said['palette']) == 150 and said['classes'][0] == 'wall'
    assert said['origin']['config'] == 'tiny' and len(said['origin']['sha256']) == 64
    # Nor where it was made.
    assert str(ROOT).encode() not in exported.path.read_bytes()


def test_a_channels_last_image_is_read_as_what_it_shows(exported):
    """The runtime itself would read its memory in the wrong order, and say nothing."""
    predict, image = open_program(exported.path), pixels(picture(SIZE))
    last = torch.from_numpy(image).to(memory_format=torch.channels_last).numpy()
    assert not last.flags.c_contiguous
    assert np.array_equal(predict(last)['labels'], predict(image)['labels'])


def test_an_image_of_another_size_is_refused(exported):
    with pytest.raises(UserError, match=r'takes images \(1, 3, 64, 128\); found \(1, 3, 128, 64\)'):
        open_program(exported.path)(pixels(picture(SIZE[::-1])))


def swap_channels(image: np.ndarray) -> np.ndarray:
    return image[:, ::-1]


def normalise_twice(image: np.ndarray) -> np.ndarray:
    return (image - 116) / 57


def read_channels_last(image: np.ndarray) -> np.ndarray:
    """What the runtime sees of an image whose memory lies in another order."""
    return np.ascontiguousarray(image.transpose(0, 2, 3, 1)).reshape(image.shape)


@pytest.mark.parametrize('spoil', [swap_channels, normalise_twice, read_channels_last])
def test_wrong_input_would_not_pass_as_verified(exported, spoil):
    predict: Model = open_program(exported.path)
    source = load_source(*exported.source, 'norms')
    images = find_images(source.cfg, None)

    def compare(model: Model) -> None:
        verify(model, source.original, 'segmentor', [SIZE], images).check('fp32')

    compare(predict)
    with pytest.raises(UserError, match='The saved model is wrong'):
        compare(lambda image: predict(spoil(image)))


def leave_out_normalisation(source) -> None:
    source.folded.data_preprocessor._enable_normalize = False


def take_channels_as_cv2_reads_them(source) -> None:
    source.folded.data_preprocessor.channel_conversion = False


@pytest.mark.full
@pytest.mark.parametrize('spoil', [leave_out_normalisation, take_channels_as_cv2_reads_them])
def test_a_broken_export_is_refused(tiny, tmp_path, monkeypatch, spoil: Callable):
    def spoilt(*args: object) -> object:
        source = load_source(*args)
        spoil(source)
        return source

    monkeypatch.setattr(exporter, 'load_source', spoilt)
    with pytest.raises(UserError, match='The saved model is wrong'):
        export_to(tmp_path / 'a.pte', ExecutorchBackend(), tiny, size=[SIZE], fuse='norms')
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
