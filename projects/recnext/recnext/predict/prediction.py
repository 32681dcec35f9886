"""What was predicted for one image: labels, areas of the classes, and a picture."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..drawing.overlay import draw_overlay


class Area(NamedTuple):
    """How much of an image one class covers."""

    label: int
    name: str
    pixels: int
    share: float  # of all pixels, from 0 to 1


@dataclass(frozen=True)
class Prediction:
    """What was predicted for one image.

    Args:
        image: (H, W, 3), RGB, uint8; of a network for other channels, (H, W, channels).
        labels: (H, W), index of the class of every pixel; uint8, or uint16 where there are more than 256 classes.
        classes: Names of all classes.
        palette: (classes, 3), RGB, uint8.
    """

    image: np.ndarray
    labels: np.ndarray
    classes: Sequence[str]
    palette: np.ndarray

    @cached_property
    def areas(self) -> list[Area]:
        """The classes in the image, the largest first."""
        # By parts: bincount makes a copy in eight bytes a pixel.
        parts = np.array_split(self.labels.ravel(), self.labels.size // 2**20 + 1)
        return list_areas(sum(np.bincount(part, minlength=len(self.classes)) for part in parts), self.classes)

    def label_image(self) -> Image.Image:
        """Return the labels as an image in palette mode, whose values are the indices; 16-bit grey if they need it."""
        image = Image.fromarray(self.labels)
        if self.labels.dtype == np.uint8:
            image.putpalette(self.palette.tobytes())
        return image

    def overlay(self, rows: int | None = None) -> Image.Image:
        """Return the image, RGB, in the colours of its classes, over a legend of them with their shares.

        Args:
            rows: Of the legend; None means as many as it takes.
        """
        legend = [(area.name, self.palette[area.label], area.share) for area in self.areas]
        image = self.image if self.image.shape[2] == 3 else self.image[..., :1].repeat(3, axis=2)
        return draw_overlay(image, self.labels, self.palette, legend, rows)

    def labels_png(self) -> bytes:
        """Return the label image as a PNG file."""
        return _encode(self.label_image(), 'PNG')

    def overlay_jpeg(self) -> bytes:
        """Return the overlay as a JPEG file."""
        return _encode(self.overlay(), 'JPEG', quality=90)

    def to_dict(self) -> dict:
        """Return ``width`` and ``height`` in pixels and ``areas``, for JSON."""
        height, width = self.labels.shape
        return dict(width=width, height=height, areas=[area._asdict() for area in self.areas])


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def list_areas(counts: np.ndarray, classes: Sequence[str]) -> list[Area]:
    """Return the areas from the pixels of every class, the largest first, without those that are absent."""
    total = int(counts.sum())
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda label: (-counts[label], label))
    return [Area(label, classes[label], int(counts[label]), round(int(counts[label]) / total, 6)) for label in order]
