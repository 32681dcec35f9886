"""The files that tests compare with: the configs here, and the reference files beside the repository."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from projects.recnext.recnext.models.recnext import ARCHS
from projects.recnext.recnext.utils.paths import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / 'shared'
ARCH_NAMES = tuple(ARCHS)
SEGMENTORS = ('m3', 'm4', 'm5', 'a3', 'a4', 'a5')
ADE20K_CONFIGS = sorted(CONFIGS.glob('fpn_recnext-*_ade20k-*.py'))
SEGMENTOR_CONFIGS = sorted(CONFIGS.glob('fpn_*.py'))
CLASSIFIER_CONFIGS = sorted(CONFIGS.glob('recnext-*.py'))


def shared(path: str) -> Path:
    """A reference file that is not part of the repository; the test is skipped, with its name, where it is absent."""
    place = SHARED / path
    if not place.exists():
        pytest.skip(f'needs ../shared/{path}, which is not there')
    return place


def config_of(arch: str) -> Path:
    return next(path for path in ADE20K_CONFIGS if f'recnext-{arch}_' in path.name)


def read_layout(name: str) -> dict:
    """Keys, shapes and dtypes of a released checkpoint."""
    return json.loads(shared(f'legacy/layouts/{name}.json').read_text())


def genuine_maps() -> dict[str, np.ndarray]:
    """Label maps of the 0.x stack, by name of the image."""
    folder = shared('legacy/real_m3/predictions')
    return {path.stem: np.array(Image.open(path)) for path in sorted(folder.glob('*.png'))}


def golden_input(height: int, width: int) -> torch.Tensor:
    """The input of the golden outputs, (1, 3, H, W) in double precision."""
    return torch.from_numpy(np.random.default_rng(height * 1000 + width).standard_normal((1, 3, height, width)))


def released_model_cfg(arch: str, num_classes: int = 150) -> dict:
    """The ``model`` of the released segmentor of one variant, without pretrained weights."""
    model_cfg = Config.fromfile(CONFIGS / '_base_' / 'models' / 'fpn_recnext.py').model
    model_cfg.backbone.arch = arch
    model_cfg.neck.in_channels = list(ARCHS[arch]['channels'])
    model_cfg.decode_head.num_classes = num_classes
    return model_cfg
