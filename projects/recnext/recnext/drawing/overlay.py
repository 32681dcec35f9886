"""A picture of one prediction: the image in the colours of its classes, over a legend of them with their shares."""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

OPACITY = 0.5
LONGEST_SIDE = 4096
"""Of the picture, in pixels; a larger image is drawn smaller."""

LEAST_WIDTH = 320
TEXT_HEIGHT = (13, 48)
"""The least and the most pixels of the legend's text, which is a fiftieth of the picture's width in between."""

Legend = Sequence[tuple[str, np.ndarray, float]]
"""Name, RGB colour and share (0 to 1) of each class."""


def draw_overlay(
    image: np.ndarray, labels: np.ndarray, palette: np.ndarray, legend: Legend, rows: int | None = None
) -> Image.Image:
    """Draw an overlay.

    Args:
        image: (H, W, 3), RGB, uint8.
        labels: (H, W), index of the class of every pixel.
        palette: (classes, 3), RGB, uint8.
        legend: What stands below it, in this order.
        rows: Of the legend, whatever is in it; None means as many as it takes.

    Returns:
        RGB. Of the size of the image with the legend below it; at least 320 wide, and the image at most 4096.
    """
    image, labels = shrink(image, labels, LONGEST_SIDE)
    height, width = image.shape[:2]
    mixed = mix(image, palette[labels])
    total = max(width, LEAST_WIDTH)
    text = int(np.clip(total / 50, *TEXT_HEIGHT))
    columns, line = max(1, total // (12 * text)), text * 3 // 2
    rows = -(-len(legend) // columns) if rows is None else rows
    picture = Image.new('RGB', (total, height + rows * line + text), 'white')
    picture.paste(Image.fromarray(mixed), (0, 0))
    draw, font = ImageDraw.Draw(picture), _font(text)
    for place, (name, colour, share) in enumerate(legend[: rows * columns]):
        row, column = divmod(place, columns)
        left, top = column * total // columns + text // 2, height + text // 2 + row * line
        draw.rectangle((left, top, left + text, top + text), fill=tuple(colour.tolist()), outline='grey')
        percent = format_share(share)
        room = total // columns - 3 * text
        while len(name) > 1 and font.getlength(f'{name} {percent}') > room:
            name = name.rstrip('…')[:-1] + '…'
        draw.text((left + text * 3 // 2, top + text // 2), f'{name} {percent}', 'black', font, anchor='lm')
    return picture


def mix(image: np.ndarray, colours: np.ndarray, opacity: float = OPACITY) -> np.ndarray:
    """Lay colours over an image.

    Args:
        image: (H, W, 3), uint8.
        colours: (H, W, 3), uint8, in the same order of channels.
        opacity: Of the colours, from 0 to 1.

    Returns:
        (H, W, 3), uint8.
    """
    return cv2.addWeighted(image, 1 - opacity, colours, opacity, 0)


def paint(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Lay the colours of its classes over an image; where a pixel has no class it stays as it is.

    Args:
        image: (H, W, 3), uint8.
        labels: (H, W), index of the class of every pixel; no class from ``len(palette)`` on.
        palette: (classes, 3), uint8, in the same order of channels.

    Returns:
        (H, W, 3), uint8.
    """
    known = labels < len(palette)
    return np.where(known[..., None], mix(image, palette[np.where(known, labels, 0)]), image)


def shrink(image: np.ndarray, labels: np.ndarray, longest_side: int) -> tuple[np.ndarray, np.ndarray]:
    """An image and its labels, no side of which is longer than so many pixels; the labels are some of those there."""
    height, width = image.shape[:2]
    factor = longest_side / max(height, width)
    if factor >= 1:
        return image, labels
    size = max(1, round(width * factor)), max(1, round(height * factor))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return image, cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)


def format_share(share: float) -> str:
    """A share (0 to 1) in per cent."""
    return f'{100 * share:.1f} %' if share >= 0.001 else '< 0.1 %'


@functools.cache
def _font(height: int) -> ImageFont.FreeTypeFont:
    # DejaVu has most of the world's letters; where matplotlib, which has it, is not installed, Pillow's own has fewer.
    matplotlib = importlib.util.find_spec('matplotlib')
    if matplotlib is None:
        return ImageFont.load_default(height)
    return ImageFont.truetype(Path(matplotlib.origin).parent / 'mpl-data' / 'fonts' / 'ttf' / 'DejaVuSans.ttf', height)
