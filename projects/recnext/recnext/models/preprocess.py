"""From an image to what the network sees: the bytes that mmseg's pipeline gives, with OpenCV alone."""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """How an image is prepared for the network. The default is that of the released segmentors.

    In mmseg's words: ``Resize(scale, keep_ratio=True)``, ``ResizeToMultiple(multiple)``, RGB, normalisation.

    Args:
        scale: The longest and the shortest side, in pixels, in either order: an image is resized, keeping its ratio,
            to be as large as fits in both. None keeps its size.
        multiple: Both sides are then stretched to the next multiple of this number of pixels.
        mean: One number for each channel, RGB, of pixels from 0 to 255.
        std: Likewise.
    """

    scale: tuple[int, int] | None = (2048, 512)
    multiple: int = 32
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return (height, width) after each of the two steps."""
        kept = height, width
        if self.scale is not None:
            factor = min(max(self.scale) / max(kept), min(self.scale) / min(kept))
            kept = tuple(int(side * factor + 0.5) for side in kept)
        return [kept, tuple(-(-side // self.multiple) * self.multiple for side in kept)]

    def resize(self, image: np.ndarray) -> np.ndarray:
        """Return an image (H, W, channels), uint8, in the size in which the network sees it."""
        for height, width in self.sizes(*image.shape[:2]):
            if image.shape[:2] != (height, width):
                shape = height, width, image.shape[2]
                # OpenCV drops the axis of a single channel.
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR).reshape(shape)
        return image

    def prepare(self, image: np.ndarray) -> 'Prepared':
        """Return an image (H, W, channels), RGB, uint8, ready for the network; may be called from several threads."""
        pixels = np.ascontiguousarray(self.resize(image).transpose(2, 0, 1))
        return Prepared(torch.from_numpy(pixels), image.shape[:2])

    def normalise(self, images: Tensor) -> Tensor:
        """Return images (N, channels, H, W) of 0 to 255 as the network takes them, float32."""
        mean, std = (torch.tensor(part, device=images.device).view(-1, 1, 1) for part in (self.mean, self.std))
        return (images.float() - mean) / std


class Prepared(NamedTuple):
    """An image that is ready for the network."""

    inputs: Tensor  # (channels, h, w), RGB, uint8
    size: tuple[int, int]  # height and width of the image that it was made of
