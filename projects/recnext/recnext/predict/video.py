"""Prediction for the frames of a video: how large every class is over time, and a video to look at."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..utils.images import ImageError
from .model import Model
from .prediction import list_areas

LEGEND_ROWS = 3
"""Below every frame, whatever is in it: the frames of a video have one size."""

CODEC = 'mp4v'
"""MPEG-4 part 2, which every OpenCV writes; browsers want another (docs/inference.md)."""


def predict_video(
    model: Model, path: str | Path, overlay: str | Path | None, on_frame: Callable[[], None] = lambda: None
) -> dict:
    """Predict a video frame by frame; one frame is in memory at a time.

    Args:
        model: Of images.
        path: Of the video.
        overlay: MP4 file to write: the frames in the colours of their classes over a legend, without sound.
        on_frame: Called after each frame.

    Returns:
        ``width`` and ``height`` in pixels, ``fps``, ``frames``, ``frame_areas``: of each frame, a dict from the index
        of each class in it to its pixels; and ``areas`` in all frames together, for JSON.

    Raises:
        ImageError: it cannot be read, or the overlay cannot be written.
    """
    if not Path(path).is_file():
        raise ImageError(f'{path} cannot be read: no such file.')
    totals, frame_areas, writer = np.zeros(len(model.classes), np.int64), [], None
    video = cv2.VideoCapture(str(path))
    try:
        fps = video.get(cv2.CAP_PROP_FPS) or 25.0
        for frame in _frames(video):
            prediction = model(frame)
            counts = {area.label: area.pixels for area in prediction.areas}
            totals[list(counts)] += list(counts.values())
            frame_areas.append(counts)
            if overlay is not None:
                picture = _even(prediction.overlay(LEGEND_ROWS))
                writer = writer or _open_writer(overlay, fps, picture.shape)
                writer.write(picture)
            on_frame()
    finally:
        video.release()
        if writer is not None:
            writer.release()
    if not frame_areas:
        raise ImageError(f'{path} is not a video that can be read.')
    if overlay is not None and _count_frames(overlay) < len(frame_areas):  # OpenCV does not tell of a full disk
        raise RuntimeError(f'OpenCV could not write all of {overlay}')
    height, width = frame.shape[:2]
    areas = [area._asdict() for area in list_areas(totals, model.classes)]
    return dict(width=width, height=height, fps=fps, frames=len(frame_areas), frame_areas=frame_areas, areas=areas)


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        there, frame = video.read()
        if not there:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def _count_frames(path: str | Path) -> int:
    """As the file says; 0 of one that was not finished."""
    video = cv2.VideoCapture(str(path))
    try:
        return int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    finally:
        video.release()


def _even(picture: Image.Image) -> np.ndarray:
    """RGB to BGR, with even sides, which the codec wants."""
    pixels = np.asarray(picture)[..., ::-1]
    return np.pad(pixels, ((0, picture.height % 2), (0, picture.width % 2), (0, 0)), constant_values=255)


def _open_writer(path: str | Path, fps: float, shape: tuple[int, ...]) -> cv2.VideoWriter:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*CODEC), fps, (shape[1], shape[0]))
    if not writer.isOpened():
        raise ImageError(f'{path} cannot be written as {CODEC} video of {shape[1]} × {shape[0]} pixels.')
    return writer
