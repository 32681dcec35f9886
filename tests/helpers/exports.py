"""A segmentor small enough to export it many times over, and what PyTorch makes of an image with it."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.networks import randomise_norms
from helpers.reference import ROOT, config_of
from projects.recnext.recnext.export.backend import Backend, ExportOptions
from projects.recnext.recnext.export.exporter import export
from projects.recnext.recnext.export.images import Images, find_images
from projects.recnext.recnext.export.source import load_source
from projects.recnext.recnext.export.verification import Model, verify
from projects.recnext.recnext.openmmlab.builder import build_without_weights
from projects.recnext.recnext.openmmlab.config import load_config
from projects.recnext.recnext.samples.scenes import make_scene
from projects.recnext.recnext.utils.errors import UserError

SIZE = (64, 128)

TINY = """
_base_ = [{base!r}]
arch = dict(_delete_=True, channels=(8, 16, 32, 64), depths=(1, 1, 1, 1), mlp_ratio=2, token_mixer={mixer!r})
model = dict(
    backbone=dict(arch=arch),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=32),
    decode_head=dict(in_channels=[32, 32, 32, 32], channels=16, num_classes={classes}),
)
"""


def write_tiny(folder: Path, mixer: str, classes: int = 150) -> tuple[str, str]:
    """Its config and checkpoint. With few classes few pixels lie between two, as in a trained network."""
    config = folder / 'tiny.py'
    config.write_text(TINY.format(base=str(config_of('m3')), mixer=mixer, classes=classes))
    torch.manual_seed(0)
    segmentor = build_without_weights(load_config(config).model)
    randomise_norms(segmentor)
    # Otherwise one class wins everywhere: the weights of a head are initialised close to zero.
    nn.init.normal_(segmentor.decode_head.conv_seg.weight)
    torch.save(dict(state_dict=segmentor.state_dict(), meta={}), folder / 'tiny.pth')
    return str(config), str(folder / 'tiny.pth')


def export_to(
    out: Path, backend: Backend, source: tuple[str, str], cfg_options: dict | None = None, **options: object
) -> str:
    """Export a config and a checkpoint as the tools do; the table."""
    return export(backend, *source, str(out), ExportOptions(**options), cfg_options)


def labels_of(source: tuple[str, str], image: np.ndarray) -> np.ndarray:
    """The label map (H, W) of an image (H, W, 3) in BGR, computed by the network as trained."""
    return scores_of(source, image).argmax(0)


def scores_of(source: tuple[str, str], image: np.ndarray) -> np.ndarray:
    """What the labels are the argmax of, (classes, H, W)."""
    original = load_source(*source, 'none').original
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    inputs = ((torch.from_numpy(image[..., ::-1].copy()) - mean) / std).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = original._forward(inputs)
        return F.interpolate(logits, image.shape[:2], mode='bilinear')[0].numpy()


def picture(size: tuple[int, int], seed: int = 5) -> np.ndarray:
    """(H, W, 3) in BGR."""
    return cv2.resize(make_scene(seed)[0][..., ::-1].copy(), size[::-1])


def pixels(image: np.ndarray) -> np.ndarray:
    """A picture as exported files take it: (1, 3, H, W), RGB from 0 to 255."""
    return image[..., ::-1].transpose(2, 0, 1)[None].astype(np.float32)


def swap_channels(image: np.ndarray) -> np.ndarray:
    return image[:, ::-1]


def normalise_twice(image: np.ndarray) -> np.ndarray:
    return (image - 116) / 57


class Exported(NamedTuple):
    """A tiny segmentor as a file, and its source."""

    path: Path
    table: str
    source: tuple[str, str]


def assert_outputs_are_those_of_pytorch(predict: Model, source: tuple[str, str]) -> None:
    """Labels and logits of an image: their form, and that no label is beaten by more than rounding."""
    image = picture(SIZE)
    outputs = predict(pixels(image))
    assert outputs['labels'].shape == SIZE and outputs['labels'].dtype == np.int32
    assert outputs['logits'].shape == (1, 150, SIZE[0] // 4, SIZE[1] // 4)
    scores = scores_of(source, image)
    behind = scores.max(0) - np.take_along_axis(scores, outputs['labels'][None].astype(np.int64), 0)[0]
    assert behind.max() <= 1e-5 * np.abs(scores).max()


def assert_it_says_what_it_is(said: dict, path: Path) -> None:
    """What a file of a tiny segmentor says of itself, and nothing of the machine that made it."""
    assert (said['height'], said['width'], said['outputs']) == (*SIZE, ['labels', 'logits'])
    assert len(said['classes']) == len(said['palette']) == 150 and said['classes'][0] == 'wall'
    assert said['origin']['config'] == 'tiny' and len(said['origin']['sha256']) == 64
    assert str(ROOT).encode() not in path.read_bytes()


def assert_spoilt_input_is_refused(
    predict: Model, source: tuple[str, str], spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    """A file is verified, and no longer is if its images are spoilt first."""
    loaded = load_source(*source, 'norms')
    images = find_images(loaded.cfg, None)

    def compare(model: Model) -> None:
        verify(model, loaded.original, 'segmentor', [SIZE], images).check('fp32')

    compare(predict)
    with pytest.raises(UserError, match='The saved model is wrong'):
        compare(lambda image: predict(spoil(image)))


def assert_fall_of_miou_is_refused(predict: Model, source: tuple[str, str]) -> None:
    """A file in 8 bits is, by what its labels lose of the network's own."""
    loaded = load_source(*source, 'none')
    images = find_images(loaded.cfg, None)
    # If the network's own labels were the truth, its mIoU would be 100.
    truth = [labels_of(source, cv2.resize(image, SIZE[::-1])) for image in images.images]
    agreement = verify(predict, loaded.original, 'segmentor', [SIZE], Images('scenes', images.images, truth))
    network, file = agreement.mious
    assert network == pytest.approx(100) and 80 < file < 100
    agreement.check('int8', max_drop=network - file + 0.01)
    with pytest.raises(UserError, match=r'mIoU falls from 100.00 .*\n?.*--max-drop allows 0'):
        agreement.check('int8', max_drop=0)


def left_behind(folder: Path) -> list[str]:
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir())
