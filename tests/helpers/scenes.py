"""Small drawn images, and files of them."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from projects.recnext.recnext.samples.scenes import make_scene

HEIGHT, WIDTH = 48, 64


def scene(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """RGB, uint8."""
    return cv2.resize(make_scene(seed)[0], (width, height))


def save(path: Path, image: np.ndarray | Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path
