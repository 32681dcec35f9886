"""Eight bits in OpenVINO: the same labels nearly everywhere, calibrated on a folder, kept, and refused where they go
wrong."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.reference import config_of
from helpers.segmentors import MEAN, SIZE, STD, head_logits, pair, raw_images, recnext_cfg
from helpers.tools import assert_user_error, run_tool

from projects.recnext.recnext.runtimes import network as network_module
from projects.recnext.recnext.runtimes import openvino as openvino_module
from projects.recnext.recnext.runtimes.calibration import NUMBER, Calibration, calibrate, choose_images
from projects.recnext.recnext.runtimes.deployment import Deployment, deploy
from projects.recnext.recnext.utils.errors import UserError


@pytest.fixture
def nncf():
    """What rounds; only those tests that have a network rounded need it."""
    pytest.importorskip('openvino')
    return pytest.importorskip('nncf')


LEAST = 0.75
"""Of the labels of this network, which has weights by chance and none that it is sure of; the bound is for others."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Of the cache."""
    monkeypatch.setattr(network_module, 'LEAST_AGREEMENT', dict(int8=LEAST))
    monkeypatch.setattr(network_module, 'FOLDER', tmp_path / 'engines')
    return tmp_path / 'engines'


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp('photos')
    (root / 'inside').mkdir()
    for index, image in enumerate(raw_images([(150, 200), (96, 128), (128, 96)] * 3, seed=7)):
        place = root / 'inside' if index % 2 else root
        cv2.imwrite(str(place / f'{index}.png'), image.permute(1, 2, 0).numpy())
    return str(root)


def made(photos: str, *keep_float: str) -> torch.nn.Module:
    model = pair(recnext_cfg(19))[1]
    deploy(model, Deployment(engine='openvino', precision='int8', calibrate=photos, keep_float=[*keep_float]))
    return model


def normalised(number: int) -> torch.Tensor:
    raw = torch.stack(raw_images([SIZE] * number, seed=50)).float()
    return (raw.flip(1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def agreement(model: torch.nn.Module) -> float:
    """Share of the labels that are those of single precision, on images that it was not calibrated on."""
    images = normalised(4)
    expected = head_logits(pair(recnext_cfg(19))[1], images)
    return float((head_logits(model, images).argmax(1) == expected.argmax(1)).double().mean())


def rounded_operations(folder: Path) -> int:
    (file,) = folder.rglob(openvino_module.ROUNDED)
    return len(re.findall('type="FakeQuantize"', file.read_text()))


@pytest.mark.usefixtures('nncf')
def test_labels_are_nearly_those_of_single_precision_and_kept(folder, photos, monkeypatch):
    assert agreement(made(photos)) > LEAST
    assert rounded_operations(folder) > 50

    def convert(*_: object) -> None:
        raise AssertionError('converted again')

    monkeypatch.setattr(openvino_module.OpenVinoEngine, 'convert', convert)
    assert agreement(made(photos)) > LEAST


@pytest.mark.full
@pytest.mark.parametrize(('overflows', 'most'), [(True, 64), (False, 127)])
def test_weights_keep_to_half_their_range_where_sums_overflow(nncf, folder, photos, monkeypatch, overflows, most):
    """Of a processor without VNNI; with all of it, 65 % of these labels were right on one."""
    monkeypatch.setattr(openvino_module, '_sums_overflow', lambda: overflows)
    monkeypatch.setattr(network_module, 'LEAST_AGREEMENT', dict(int8=0))
    made(photos)(normalised(1))
    import openvino

    (file,) = folder.rglob(openvino_module.ROUNDED)
    operations = openvino.Core().read_model(file).get_ops()
    weights = [op.data for op in operations if op.get_type_name() == 'Constant' and op.data.dtype == np.int8]
    assert len(weights) > 20
    assert sorted(int(np.abs(one.astype(int)).max()) for one in weights)[len(weights) // 2] <= most
    if not overflows:
        assert max(np.abs(one.astype(int)).max() for one in weights) > 100


@pytest.mark.full
@pytest.mark.usefixtures('nncf')
def test_modules_that_are_kept(folder, photos):
    """All: nothing is rounded, and logits are those of single precision. Some: fewer are."""
    model = made(photos, 'backbone', 'neck', 'decode_head')
    images = normalised(2)
    expected = head_logits(pair(recnext_cfg(19))[1], images)
    assert (head_logits(model, images) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert rounded_operations(folder) == 0
    shutil.rmtree(folder)
    made(photos, 'backbone.stages.*')(images)
    assert 0 < rounded_operations(folder) < 50


@pytest.mark.usefixtures('nncf', 'folder')
def test_other_images_make_another_network(photos, tmp_path):
    shutil.copytree(photos, tmp_path / 'copy')
    same, renamed = made(photos).forward_logits.made_of, made(str(tmp_path / 'copy')).forward_logits.made_of
    assert same == renamed
    (tmp_path / 'copy' / '0.png').unlink()
    assert made(str(tmp_path / 'copy')).forward_logits.made_of != same
    assert made(photos, 'neck').forward_logits.made_of != same


@pytest.mark.full
@pytest.mark.usefixtures('nncf')
def test_a_network_of_one_size(folder, photos, monkeypatch):
    """Where none can be captured for all sizes; the images to calibrate with are of others."""
    capture = network_module.capture

    def only_one_size(module: torch.nn.Module, size: tuple, dynamic: dict | None, batch: int) -> object:
        if dynamic:
            raise RuntimeError('not for all')
        return capture(module, size, dynamic, batch)

    monkeypatch.setattr(network_module, 'capture', only_one_size)
    assert agreement(made(photos)) > LEAST


@pytest.mark.full
@pytest.mark.usefixtures('nncf')
def test_labels_that_are_others_are_refused(folder, photos, monkeypatch):
    def of_another_range(folder: Path, calibration: Calibration) -> None:
        quantize(folder, replace(calibration, load=lambda image: calibration.load(image) / 50))

    quantize = openvino_module._quantize
    monkeypatch.setattr(openvino_module, '_quantize', of_another_range)
    with pytest.raises(UserError, match=r'Nothing was kept\.') as error:
        agreement(made(photos))
    assert re.search(r'other logits than PyTorch|in int8 has the same class as PyTorch in', str(error.value))
    assert not list(folder.rglob(openvino_module.ROUNDED))


# --- Words and folders ---


@pytest.mark.parametrize(
    ('form', 'message'),
    [
        (dict(precision='int8'), 'Use --engine openvino'),
        (
            dict(precision='int8', engine='onnxruntime', calibrate='.'),
            'onnxruntime computes in fp32; found precision int8',
        ),
        (dict(precision='bf16', calibrate='.'), '--calibrate and --keep-float are for --precision int8; found bf16'),
        (dict(keep_float=['neck']), 'are for --precision int8; found fp32'),
    ],
)
def test_words_that_do_not_go_together(form, message):
    if form.get('engine'):
        pytest.importorskip(form['engine'])
    with pytest.raises(UserError, match=message):
        Deployment(**form)


@pytest.mark.usefixtures('nncf')
def test_int8_needs_a_folder():
    with pytest.raises(UserError, match='int8 needs a folder with some hundred images'):
        Deployment(precision='int8', engine='openvino')


@pytest.mark.parametrize(
    ('folder', 'keep_float', 'message'),
    [
        ('none', (), 'takes a folder of images; none is none'),
        ('empty', (), 'empty holds no images'),
        ('photos', ('decode_head.seg',), r'--keep-float decode_head.seg: no module .* The nearest: .*decode_head'),
    ],
)
def test_folders_and_patterns_that_are_wrong(tmp_path, monkeypatch, photos, folder, keep_float, message):
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    with pytest.raises(UserError, match=message):
        calibrate(pair(recnext_cfg(19))[1], photos if folder == 'photos' else folder, keep_float)


@pytest.mark.usefixtures('nncf')
def test_a_wrong_folder_is_said_before_anything_is_written(tiny, tmp_path):
    config, checkpoint = tiny
    options = ['--engine', 'openvino', '--precision', 'int8', '--calibrate', tmp_path / 'none']
    result = run_tool('test', config, checkpoint, '--work-dir', tmp_path / 'work', *options)
    assert_user_error(result, '--calibrate takes a folder of images', f'{tmp_path / "none"} is none')
    assert not (tmp_path / 'work').exists()


def test_at_most_so_many_images_and_the_same_every_time():
    images = [Path(f'{index}.png') for index in range(NUMBER + 50)]
    named, chosen = choose_images(images, 'here')
    assert named == f'{NUMBER} of {NUMBER + 50} images of here'
    assert chosen == choose_images(images, 'here')[1] and len(set(chosen)) == NUMBER


def test_images_are_as_the_network_takes_them(photos):
    calibration = calibrate(pair(recnext_cfg(19))[1], photos, ())
    assert len(calibration) == 9 and 'few' in str(calibration)
    for inputs in calibration:
        assert inputs.shape[:2] == (1, 3) and min(inputs.shape[2:]) == 224 and inputs.shape[2] % 32 == 0
        assert abs(inputs.mean()) < 1.5 and 0.1 < inputs.std() < 2


# --- The command ---


@pytest.mark.full
@pytest.mark.usefixtures('nncf')
def test_the_tool_in_eight_bits(real_m3, ade20k_sample, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    result = run_tool(
        'test', config_of('m3'), real_m3, '--data-root', ade20k_sample, '--work-dir', tmp_path / 'work',
        '--engine', 'openvino', '--precision', 'int8', '--calibrate', ade20k_sample / 'images', fresh=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = float(re.search(r'mIoU: ([\d.]+)', result.stdout)[1])
    assert abs(found - 38.6) <= 0.5
