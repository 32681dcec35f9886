"""A segmentor small enough to export it many times over, and what PyTorch makes of an image with it."""

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from helpers.networks import randomise_norms
from helpers.reference import config_of
from projects.recnext.recnext.datasets.samples.scenes import make_scene
from projects.recnext.recnext.engine.config import load_config
from projects.recnext.recnext.export.backend import Backend, ExportOptions
from projects.recnext.recnext.export.exporter import export
from projects.recnext.recnext.export.source import load_source
from projects.recnext.recnext.models.builder import build_without_weights

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


def left_behind(folder: Path) -> list[str]:
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir())
