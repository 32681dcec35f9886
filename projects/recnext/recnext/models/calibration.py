"""Images as a network takes them, and those of a folder for an engine that computes in eight bits."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from mmseg.structures import SegDataSample
from torch import Tensor

from ..runtimes.calibration import Calibration, check_patterns, choose_images, images_in
from ..runtimes.capture import LEAST, STRIDE
from ..utils.image_io import read_image
from .deployable_model import DeployableModel

SIDE = 224
"""Pixels of the short side of an image for a network that has no size of its own, as classifiers."""


def preprocess(model: DeployableModel, image: np.ndarray) -> Tensor:
    """What mmseg makes of an image (H, W, 3) in BGR before the network sees it: (1, 3, H, W)."""
    inputs = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return model.data_preprocessor(dict(inputs=[inputs], data_samples=[SegDataSample()]))['inputs']


def calibration_of(model: DeployableModel, folder: str, keep_float: Sequence[str]) -> Calibration:
    """The images of a folder, their short sides as long as those of the crops of training, normalised.

    Args:
        model: Names its modules, and normalises.
        folder: With the folders in it.
        keep_float: Patterns of names of modules.

    Raises:
        UserError: no images, or a pattern that no module fits.
    """
    check_patterns(model, keep_float)
    named, images = choose_images(images_in(Path(folder)), folder)
    side = min(getattr(model.data_preprocessor, 'size', None) or (SIDE,))

    def load(path: Path) -> np.ndarray:
        image = read_image(path)
        scale = side / min(image.shape[:2])
        height, width = (max(round(length * scale / STRIDE) * STRIDE, LEAST) for length in image.shape[:2])
        return preprocess(model, cv2.resize(image, (width, height))).numpy()

    return Calibration(named, images, load, keep_float)
