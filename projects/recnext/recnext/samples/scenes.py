"""Procedural street, room and coast scenes with exact annotations, in the layout of ADE20K.

Made to be learnt, not looked up: every object varies in colour, size, texture and place, they hide each other, the
ground recedes in perspective, light falls from one side, and sensor noise and JPEG come last. Everything is drawn
from one seeded generator a picture, so the same seed gives the same bytes.
"""

import colorsys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from ..utils.errors import UserError
from ..utils.files import atomic_write

LABELS = dict(
    wall=1, building=2, sky=3, floor=4, tree=5, ceiling=6, road=7, bed=8, windowpane=9, grass=10, cabinet=11,
    sidewalk=12, person=13, door=15, table=16, mountain=17, curtain=19, car=21, painting=23, sofa=24, sea=27, rug=29,
    fence=33, rock=35, lamp=37, sand=47, boat=77,
)  # fmt: skip
"""The classes that the scenes show, in ADE20K's annotation values; 0 is unlabelled."""

PARTS = ('images', 'annotations')
SPLITS = ('training', 'validation')
HEIGHT, WIDTH = 192, 256
JPEG_QUALITY = 92

# Hue, saturation and value are drawn from these ranges (of 0 to 1; a hue beyond 1 wraps around).
COLOURS = dict(
    sky=((0.54, 0.62), (0.15, 0.6), (0.8, 1.0)),
    sea=((0.5, 0.6), (0.5, 0.8), (0.35, 0.6)),
    sand=((0.09, 0.13), (0.3, 0.5), (0.75, 0.95)),
    rock=((0.05, 0.12), (0.1, 0.25), (0.25, 0.45)),
    mountain=((0.55, 0.7), (0.1, 0.3), (0.35, 0.6)),
    boat=((0.95, 1.05), (0.5, 0.9), (0.5, 0.9)),
    building=((0.98, 1.1), (0.15, 0.5), (0.45, 0.8)),
    windowpane=((0.5, 0.6), (0.1, 0.4), (0.7, 1.0)),
    road=((0.55, 0.7), (0.0, 0.1), (0.25, 0.42)),
    sidewalk=((0.08, 0.15), (0.03, 0.12), (0.55, 0.75)),
    grass=((0.22, 0.3), (0.5, 0.8), (0.4, 0.65)),
    tree=((0.27, 0.4), (0.45, 0.8), (0.2, 0.42)),
    fence=((0.05, 0.1), (0.4, 0.7), (0.35, 0.6)),
    car=((0.0, 1.0), (0.6, 0.95), (0.5, 0.9)),
    person=((0.0, 1.0), (0.4, 0.9), (0.3, 0.8)),
    wall=((0.08, 0.2), (0.05, 0.3), (0.7, 0.92)),
    ceiling=((0.1, 0.15), (0.0, 0.08), (0.85, 1.0)),
    floor=((0.05, 0.1), (0.35, 0.65), (0.4, 0.65)),
    rug=((0.85, 1.0), (0.4, 0.8), (0.35, 0.65)),
    bed=((0.55, 0.75), (0.15, 0.45), (0.7, 0.95)),
    sofa=((0.7, 0.9), (0.25, 0.6), (0.3, 0.55)),
    table=((0.04, 0.08), (0.5, 0.75), (0.25, 0.42)),
    cabinet=((0.06, 0.1), (0.3, 0.55), (0.55, 0.8)),
    door=((0.02, 0.07), (0.45, 0.7), (0.45, 0.65)),
    curtain=((0.3, 0.5), (0.25, 0.6), (0.5, 0.8)),
    painting=((0.0, 1.0), (0.3, 0.9), (0.3, 0.9)),
    lamp=((0.12, 0.16), (0.4, 0.7), (0.92, 1.0)),
)


class _Canvas:
    """A picture and its annotation, painted from back to front."""

    def __init__(self, rng: Generator) -> None:
        self.rng = rng
        self.image = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        self.labels = np.zeros((HEIGHT, WIDTH), np.uint8)
        self.y, self.x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)

    def colour(self, name: str) -> np.ndarray:
        hue, saturation, value = (self.rng.uniform(*limits) for limits in COLOURS[name])
        return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)

    def noise(self, cell: float, strength: float) -> np.ndarray:
        """Smooth multiplicative noise around 1 that varies over ``cell`` pixels."""
        grid = self.rng.standard_normal((max(2, int(HEIGHT / cell)), max(2, int(WIDTH / cell)))).astype(np.float32)
        return 1 + strength * cv2.resize(grid, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)

    def polygon(self, *points: tuple[float, float]) -> np.ndarray:
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        cv2.fillPoly(mask, [np.round(np.array(points)).astype(np.int32)], 1)
        return mask.astype(bool)

    def box(self, left: float, top: float, right: float, bottom: float) -> np.ndarray:
        return (self.x >= left) & (self.x < right) & (self.y >= top) & (self.y < bottom)

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> np.ndarray:
        return ((self.x - x) / rx) ** 2 + ((self.y - y) / ry) ** 2 <= 1

    def paint(
        self, mask: np.ndarray, name: str, texture: np.ndarray | float = 1, colour: np.ndarray | None = None
    ) -> None:
        colour = self.colour(name) if colour is None else colour
        shaded = colour * (texture[..., None] if isinstance(texture, np.ndarray) else texture)
        self.image[mask] = np.broadcast_to(shaded, self.image.shape)[mask]
        self.labels[mask] = LABELS[name]

    def darken(self, mask: np.ndarray, factor: float) -> None:
        """A shadow: the labels under it stay."""
        self.image[mask] *= factor

    def ground(self, horizon: float) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates on a plane that meets the horizon: across and away, in metres or so."""
        away = 40 / np.maximum(self.y - horizon, 0.5)
        return (self.x - WIDTH / 2) * away / 40, away


def make_scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene.

    Args:
        seed: Of everything in it.

    Returns:
        The picture (192, 256, 3), BGR, and its annotation (192, 256), values of :data:`LABELS` and 0; both uint8.
    """
    rng = np.random.default_rng(seed)
    canvas = _Canvas(rng)
    draw: Callable[[_Canvas, Generator], None] = rng.choice([_street, _room, _coast], p=[0.35, 0.45, 0.2])
    draw(canvas, rng)
    _clutter(canvas, rng)
    return _photograph(canvas, rng), canvas.labels


def _sky(canvas: _Canvas, rng: Generator, horizon: float) -> None:
    gradient = 0.8 + 0.25 * canvas.y / horizon
    canvas.paint(canvas.y < horizon, 'sky', gradient * canvas.noise(40, 0.08))


def _mountains(canvas: _Canvas, rng: Generator, horizon: float) -> None:
    heights = rng.uniform(0.05, 0.45, 7) * horizon
    ridge = np.interp(canvas.x[0], np.linspace(0, WIDTH, 7), horizon - heights)
    mask = (canvas.y >= ridge[None]) & (canvas.y < horizon)
    canvas.paint(mask, 'mountain', canvas.noise(9, 0.12) * (0.8 + 0.3 * canvas.y / horizon))


def _street(canvas: _Canvas, rng: Generator) -> None:
    horizon = rng.uniform(0.35, 0.5) * HEIGHT
    _sky(canvas, rng, horizon + 1)
    if rng.random() < 0.4:
        _mountains(canvas, rng, horizon + 1)
    across, away = canvas.ground(horizon)
    below = canvas.y >= horizon
    canvas.paint(below, 'grass', canvas.noise(3, 0.22))
    middle, road = rng.uniform(-0.4, 0.4), rng.uniform(0.7, 1.3)
    offset = np.abs(across - middle)
    slabs = np.where((away % 0.5 < 0.06) | (across % 0.5 < 0.05), 0.75, 1.0).astype(np.float32)
    canvas.paint(below & (offset < road + rng.uniform(0.3, 0.6)), 'sidewalk', slabs * canvas.noise(6, 0.05))
    asphalt = canvas.noise(2, 0.12)
    asphalt[(offset < 0.04) & (away % 1 < 0.5)] *= 2.2
    canvas.paint(below & (offset < road), 'road', asphalt)
    x = rng.uniform(-40, 20)
    while x < WIDTH:
        width = rng.uniform(35, 75)
        kind = rng.random()
        if kind < 0.6:
            _building(canvas, rng, x, x + width, horizon * rng.uniform(0.05, 0.6), horizon + rng.uniform(2, 14))
        elif kind < 0.85:
            _fence(canvas, rng, x, x + width, horizon - rng.uniform(8, 20), horizon + rng.uniform(4, 10))
        x += width * rng.uniform(0.8, 1.5)
    for _ in range(rng.integers(1, 5)):
        _tree(canvas, rng, rng.uniform(0, WIDTH), horizon + rng.uniform(5, 35))
    traffic = [_car] * rng.integers(1, 4) + [_person] * rng.integers(1, 4)
    things = [(horizon + rng.uniform(12, 75), draw) for draw in traffic]
    for foot, draw in sorted(things, key=lambda thing: thing[0]):
        draw(canvas, rng, rng.uniform(15, WIDTH - 15), foot, (foot - horizon) / 40)


def _building(canvas: _Canvas, rng: Generator, left: float, right: float, top: float, bottom: float) -> None:
    brick = np.where((canvas.y % 5 < 1) | ((canvas.x + 4 * (canvas.y // 5 % 2)) % 9 < 1), 0.8, 1.0).astype(np.float32)
    side = 1 if rng.random() < 0.5 else 0.75
    canvas.paint(canvas.box(left, top, right, bottom), 'building', brick * canvas.noise(8, 0.06) * side)
    glass = canvas.colour('windowpane')
    step_x, step_y = rng.uniform(14, 20), rng.uniform(18, 26)
    for y in np.arange(top + 6, bottom - 14, step_y):
        for x in np.arange(left + 5, right - 9, step_x):
            gleam = (0.75 + 0.5 * ((canvas.x + canvas.y) % 14 < 5)).astype(np.float32)
            canvas.paint(canvas.box(x, y, x + 8, y + 12), 'windowpane', gleam, glass)


def _fence(canvas: _Canvas, rng: Generator, left: float, right: float, top: float, bottom: float) -> None:
    pickets = (0.65 + 0.5 * (canvas.x % 6 < 4)).astype(np.float32)
    canvas.paint(canvas.box(left, top, right, bottom), 'fence', pickets)


def _tree(canvas: _Canvas, rng: Generator, x: float, foot: float) -> None:
    size = rng.uniform(16, 34)
    trunk = np.array([0.3, 0.2, 0.12], np.float32) * rng.uniform(0.7, 1.2)
    canvas.darken(canvas.ellipse(x, foot, size * 0.8, size * 0.15), 0.65)
    canvas.paint(canvas.box(x - size / 9, foot - size * 1.2, x + size / 9, foot), 'tree', colour=trunk)
    leaves, colour = canvas.noise(2.5, 0.35), canvas.colour('tree')
    for _ in range(7):
        dx, dy = rng.uniform(-0.6, 0.6) * size, rng.uniform(-2.2, -1.0) * size
        crown = canvas.ellipse(x + dx, foot + dy, rng.uniform(0.4, 0.7) * size, rng.uniform(0.4, 0.6) * size)
        canvas.paint(crown, 'tree', leaves * rng.uniform(0.8, 1.2), colour)


def _car(canvas: _Canvas, rng: Generator, x: float, foot: float, scale: float) -> None:
    width, height = 34 * (0.5 + scale), 13 * (0.5 + scale)
    canvas.darken(canvas.ellipse(x, foot, width * 0.6, height * 0.25), 0.5)
    colour = canvas.colour('car')
    canvas.paint(canvas.box(x - width / 2, foot - height, x + width / 2, foot - height * 0.15), 'car', colour=colour)
    top = foot - height * 1.7
    roof = [(x - width * 0.3, foot - height), (x - width * 0.2, top), (x + width * 0.2, top)]
    canvas.paint(canvas.polygon(*roof, (x + width * 0.32, foot - height)), 'car', 0.85, colour)
    dark = np.array([0.12, 0.14, 0.17], np.float32)
    glass = canvas.box(x - width * 0.17, foot - height * 1.55, x + width * 0.17, foot - height * 1.05)
    canvas.paint(glass, 'car', colour=dark * 2)
    for wheel in (-0.3, 0.3):
        canvas.paint(
            canvas.ellipse(x + wheel * width, foot - height * 0.15, height / 3, height / 3), 'car', colour=dark
        )


def _person(canvas: _Canvas, rng: Generator, x: float, foot: float, scale: float) -> None:
    height = 30 * (0.5 + scale)
    canvas.darken(canvas.ellipse(x, foot, height * 0.25, height * 0.06), 0.6)
    skin = np.array([0.85, 0.65, 0.5], np.float32) * rng.uniform(0.5, 1.1)
    canvas.paint(canvas.box(x - height * 0.1, foot - height * 0.5, x + height * 0.1, foot), 'person', 0.7)
    canvas.paint(canvas.ellipse(x, foot - height * 0.62, height * 0.15, height * 0.24), 'person')
    canvas.paint(canvas.ellipse(x, foot - height * 0.92, height * 0.09, height * 0.1), 'person', colour=skin)


def _coast(canvas: _Canvas, rng: Generator) -> None:
    horizon = rng.uniform(0.3, 0.5) * HEIGHT
    _sky(canvas, rng, horizon + 1)
    if rng.random() < 0.6:
        _mountains(canvas, rng, horizon + 1)
    _, away = canvas.ground(horizon)
    waves = (1 + 0.18 * np.sin(away * 25 + canvas.noise(20, 1.5) * 2)).astype(np.float32)
    canvas.paint(canvas.y >= horizon, 'sea', waves * canvas.noise(6, 0.06))
    for _ in range(rng.integers(1, 4)):
        _boat(canvas, rng, rng.uniform(15, WIDTH - 15), horizon + rng.uniform(4, 30))
    shore = rng.uniform(0.62, 0.8) * HEIGHT + rng.uniform(-0.15, 0.15) * (canvas.x - WIDTH / 2)
    shore += 5 * np.sin(canvas.x / rng.uniform(15, 40))
    canvas.paint(canvas.y >= shore, 'sand', canvas.noise(2, 0.07) * canvas.noise(30, 0.06))
    for _ in range(rng.integers(1, 5)):
        x, y, size = rng.uniform(0, WIDTH), rng.uniform(0.62, 0.95) * HEIGHT, rng.uniform(8, 26)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = size * rng.uniform(0.7, 1.1, 9)
        canvas.darken(canvas.ellipse(x + 4, y + size * 0.4, size, size * 0.3), 0.7)
        corners = zip(x + radius * np.cos(angles), y + 0.6 * radius * np.sin(angles))
        canvas.paint(canvas.polygon(*corners), 'rock', canvas.noise(4, 0.25))
    for _ in range(rng.integers(0, 4)):
        foot = rng.uniform(0.75, 0.98) * HEIGHT
        _person(canvas, rng, rng.uniform(10, WIDTH - 10), foot, (foot - horizon) / 60)


def _boat(canvas: _Canvas, rng: Generator, x: float, y: float) -> None:
    size = rng.uniform(12, 30)
    hull = [(x - size, y - size * 0.3), (x + size, y - size * 0.3), (x + size * 0.7, y + size * 0.15)]
    canvas.paint(canvas.polygon(*hull, (x - size * 0.7, y + size * 0.15)), 'boat')
    sail = canvas.polygon((x, y - size * 1.7), (x + size * 0.7, y - size * 0.4), (x, y - size * 0.4))
    canvas.paint(sail, 'boat', colour=np.array([0.95, 0.93, 0.88], np.float32))


def _room(canvas: _Canvas, rng: Generator) -> None:
    left, right = rng.uniform(0.02, 0.25) * WIDTH, rng.uniform(0.75, 0.98) * WIDTH
    top, bottom = rng.uniform(0.08, 0.2) * HEIGHT, rng.uniform(0.55, 0.7) * HEIGHT
    paper = (1 + 0.05 * np.sign(np.sin(canvas.x / rng.uniform(2, 4)))).astype(np.float32) * canvas.noise(30, 0.04)
    plaster = canvas.colour('wall')
    canvas.paint(canvas.x >= 0, 'wall', paper, plaster)
    for corner, shade in ((0, rng.uniform(0.7, 0.85)), (WIDTH, rng.uniform(0.85, 1.0))):
        edge = left if corner == 0 else right
        side = canvas.polygon((corner, 0), (edge, top), (edge, bottom), (corner, HEIGHT))
        canvas.paint(side, 'wall', paper * shade, plaster)
    ceiling = canvas.polygon((0, 0), (WIDTH, 0), (right, top), (left, top))
    canvas.paint(ceiling, 'ceiling', canvas.noise(30, 0.03))
    across, away = canvas.ground(bottom - 45)
    planks = np.where((across % 0.18 < 0.02) | (away % 0.4 < 0.015), 0.7, 1.0).astype(np.float32)
    floor = canvas.polygon((left, bottom), (right, bottom), (WIDTH, HEIGHT), (0, HEIGHT))
    canvas.paint(floor, 'floor', planks * canvas.noise(5, 0.08))
    if rng.random() < 0.6:
        x, y = rng.uniform(0.35, 0.65) * WIDTH, rng.uniform(0.8, 0.92) * HEIGHT
        pattern = (0.8 + 0.4 * ((across * 6 + away * 4) % 1 < 0.5)).astype(np.float32)
        canvas.paint(canvas.ellipse(x, y, rng.uniform(35, 70), rng.uniform(9, 20)) & floor, 'rug', pattern)
    _on_the_wall(canvas, rng, left, right, top, bottom)
    furniture = [_bed, _sofa, _table, _cabinet]
    rng.shuffle(furniture)
    feet = np.sort(rng.uniform(bottom + 6, HEIGHT - 4, rng.integers(2, 5)))
    for foot, draw in zip(feet, furniture):
        draw(canvas, rng, rng.uniform(0.12, 0.88) * WIDTH, foot, 0.75 + (foot - bottom) / 90)
    if rng.random() < 0.75:
        _lamp(canvas, rng, rng.uniform(left, right), top)
    if rng.random() < 0.4:
        _person(canvas, rng, rng.uniform(0.1, 0.9) * WIDTH, rng.uniform(bottom + 12, HEIGHT), 1.6)


def _on_the_wall(canvas: _Canvas, rng: Generator, left: float, right: float, top: float, bottom: float) -> None:
    slots = np.linspace(left + 4, right - 4, 4)
    height = bottom - top
    for start, end in pairwise(slots):
        kind = rng.choice(['door', 'window', 'painting', 'none'])
        inset = (end - start) * rng.uniform(0.08, 0.25)
        start, end = start + inset, end - inset
        if kind == 'door':
            panels = np.where(((canvas.x - start) % 16 < 2) | ((canvas.y - bottom) % 24 < 2), 0.75, 1.0)
            place = canvas.box(start, top + height * 0.18, min(end, start + 34), bottom)
            canvas.paint(place, 'door', panels.astype(np.float32))
        elif kind == 'window':
            upper, lower = top + height * 0.15, top + height * rng.uniform(0.6, 0.75)
            bars = (np.abs(canvas.x - (start + end) / 2) < 1.5) | (np.abs(canvas.y - upper - 20) < 1.5)
            cross = np.where(bars, 0.5, 1.1).astype(np.float32)
            canvas.paint(canvas.box(start, upper, end, lower), 'windowpane', cross)
            if rng.random() < 0.7:
                folds = (1 + 0.2 * np.sin(canvas.x * rng.uniform(0.8, 1.4))).astype(np.float32)
                cloth, width = canvas.colour('curtain'), (end - start) * 0.28
                for edge in (start - width * 0.5, end - width * 0.5):
                    place = canvas.box(edge, upper - 5, edge + width, lower + height * 0.15)
                    canvas.paint(place, 'curtain', folds, cloth)
        elif kind == 'painting':
            upper, lower = top + height * 0.2, top + height * rng.uniform(0.45, 0.6)
            frame = np.array([0.25, 0.16, 0.08], np.float32)
            canvas.paint(canvas.box(start, upper, end, lower), 'painting', colour=frame)
            canvas.paint(canvas.box(start + 3, upper + 3, end - 3, lower - 3), 'painting', canvas.noise(5, 0.45))


def _bed(canvas: _Canvas, rng: Generator, x: float, foot: float, scale: float) -> None:
    width, height = 80 * scale, 26 * scale
    canvas.darken(canvas.ellipse(x, foot, width * 0.55, height * 0.2), 0.6)
    colour = canvas.colour('bed')
    blanket = (1 + 0.08 * np.sign(np.sin(canvas.x / 5) * np.sin(canvas.y / 5))).astype(np.float32)
    canvas.paint(canvas.box(x - width / 2, foot - height * 0.7, x + width / 2, foot), 'bed', blanket * 0.85, colour)
    mattress = [(x - width * 0.5, foot - height * 0.7), (x - width * 0.4, foot - height * 1.2)]
    canvas.paint(
        canvas.polygon(*mattress, (x + width * 0.4, foot - height * 1.2), (x + width * 0.5, foot - height * 0.7)),
        'bed', blanket * 1.05, colour,
    )  # fmt: skip
    pillow = canvas.ellipse(x - width * 0.27, foot - height * 1.15, width * 0.11, height * 0.16)
    canvas.paint(pillow, 'bed', colour=np.array([0.96, 0.95, 0.93], np.float32))


def _sofa(canvas: _Canvas, rng: Generator, x: float, foot: float, scale: float) -> None:
    width, height = 62 * scale, 32 * scale
    canvas.darken(canvas.ellipse(x, foot, width * 0.55, height * 0.15), 0.6)
    colour, weave = canvas.colour('sofa'), canvas.noise(2, 0.1)
    back = canvas.box(x - width * 0.45, foot - height, x + width * 0.45, foot - height * 0.3)
    canvas.paint(back, 'sofa', weave * 0.9, colour)
    seat = canvas.box(x - width * 0.45, foot - height * 0.5, x + width * 0.45, foot)
    cushions = np.where((canvas.x - x + width) % (width * 0.3) < 1.5, 0.7, 1.15).astype(np.float32)
    canvas.paint(seat, 'sofa', weave * cushions, colour)
    for side in (-0.5, 0.4):
        arm = canvas.box(x + side * width, foot - height * 0.65, x + (side + 0.1) * width, foot)
        canvas.paint(arm, 'sofa', weave * 0.75, colour)


def _table(canvas: _Canvas, rng: Generator, x: float, foot: float, scale: float) -> None:
    width, height = 50 * scale, 26 * scale
    colour, grain = canvas.colour('table'), canvas.noise(4, 0.12)
    canvas.darken(canvas.ellipse(x, foot, width * 0.45, height * 0.12), 0.65)
    for side in (-0.42, 0.36):
        canvas.paint(canvas.box(x + side * width, foot - height, x + (side + 0.09) * width, foot), 'table', 0.7, colour)
    top = [(x - width * 0.5, foot - height * 0.75), (x - width * 0.35, foot - height * 1.2)]
    canvas.paint(
        canvas.polygon(*top, (x + width * 0.35, foot - height * 1.2), (x + width * 0.5, foot - height * 0.75)),
        'table', grain, colour,
    )  # fmt: skip


def _cabinet(canvas: _Canvas, rng: Generator, x: float, foot: float, scale: float) -> None:
    width, height = rng.uniform(30, 50) * scale, rng.uniform(40, 62) * scale
    colour = canvas.colour('cabinet')
    canvas.darken(canvas.ellipse(x, foot, width * 0.6, height * 0.08), 0.6)
    top, left = foot - height, x - width / 2
    doors = ((canvas.x - left) % (width / 2) < 2) | ((canvas.y - top) % (height / 3) < 2)
    front = np.where(doors, 0.6, 1.0).astype(np.float32)
    canvas.paint(canvas.box(left, top, left + width, foot), 'cabinet', front, colour)
    near, far, inset = left + width, left + width * 1.15, height * 0.08
    side = canvas.polygon((near, top), (far, top + inset), (far, foot - inset), (near, foot))
    canvas.paint(side, 'cabinet', 0.7, colour)


def _lamp(canvas: _Canvas, rng: Generator, x: float, top: float) -> None:
    length, size = rng.uniform(10, 30), rng.uniform(11, 19)
    canvas.paint(canvas.box(x - 1, top * 0.5, x + 1, top + length), 'lamp', 0.3)
    shade = [(x - size * 0.5, top + length), (x + size * 0.5, top + length), (x + size, top + length + size)]
    canvas.paint(canvas.polygon(*shade, (x - size, top + length + size)), 'lamp')


def _clutter(canvas: _Canvas, rng: Generator) -> None:
    """Things that nobody labelled."""
    for _ in range(rng.integers(0, 4)):
        x, y, size = rng.uniform(0, WIDTH), rng.uniform(0.4, 1) * HEIGHT, rng.uniform(2, 6)
        mask = canvas.ellipse(x, y, size, size * rng.uniform(0.4, 1))
        canvas.image[mask] = rng.random(3).astype(np.float32)
        canvas.labels[mask] = 0


def _photograph(canvas: _Canvas, rng: Generator) -> np.ndarray:
    """Light from one side, its colour, the lens and the sensor; RGB 0 to 1 becomes BGR uint8."""
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * (canvas.x / WIDTH - 0.5) + np.sin(angle) * (canvas.y / HEIGHT - 0.5)
    light = rng.uniform(0.75, 1.2) * (1 + rng.uniform(0, 0.35) * slope)
    image = canvas.image * light[..., None] * rng.uniform(0.92, 1.08, 3)
    image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.4, 0.8))
    image += rng.uniform(0.01, 0.035) * rng.standard_normal(image.shape)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)[..., ::-1]


def write_dataset(root: str | Path, training: int, validation: int, seed: int = 0) -> str:
    """Write scenes as ``images|annotations/training|validation``; no scene of one split is in the other.

    Args:
        root: Folder of the dataset; it appears when it is complete.
        training: Number of training scenes.
        validation: Number of validation scenes.
        seed: The same seed gives the same files, to the byte.

    Returns:
        What was written, and how well one would do without looking.

    Raises:
        UserError: there is something at ``root`` already, or nothing can be written there.
    """
    from multiprocessing import Pool

    from rich.progress import track

    root = Path(root)
    if root.exists():
        raise UserError(f'{root} is there already. Remove it, or choose another folder.')
    numbers = dict(zip(SPLITS, (training, validation)))
    with atomic_write(root) as beside:
        jobs = [(beside, split, index, seed) for split in SPLITS for index in range(numbers[split])]
        for part in PARTS:
            for split in SPLITS:
                (beside / part / split).mkdir(parents=True)
        with Pool() as pool:
            results = pool.imap_unordered(_write_scene, jobs)
            counts = dict.fromkeys(SPLITS, np.zeros(max(LABELS.values()) + 1, int))
            for split, pixels in track(results, 'Drawing scenes', total=len(jobs)):
                counts[split] = counts[split] + pixels
    name, miou = best_constant(counts['validation'])
    return (
        f'{root}: {training} training and {validation} validation scenes of {len(LABELS)} classes. '
        f'To predict {name} everywhere would give mIoU {miou:.2f} on the validation scenes.'
    )


def best_constant(pixels: np.ndarray) -> tuple[str, float]:
    """The class that is best predicted everywhere, and the mIoU in per cent over the classes present.

    Args:
        pixels: How many pixels have each label, from 0 (unlabelled, which does not count).
    """
    labelled = pixels[1:]
    name = next((name for name, label in LABELS.items() if label == labelled.argmax() + 1), 'nothing')
    return name, 100 * labelled.max() / max(labelled.sum(), 1) / max((labelled > 0).sum(), 1)


def _write_scene(job: tuple[Path, str, int, int]) -> tuple[str, np.ndarray]:
    root, split, index, seed = job
    # One seed a picture: it does not depend on how many others there are.
    scene_seed = np.random.SeedSequence([seed, SPLITS.index(split), index]).generate_state(1)[0]
    image, labels = make_scene(scene_seed)
    name = f'scene_{split}_{index:05d}'
    for part, suffix, picture in zip(PARTS, ('.jpg', '.png'), (image, labels)):
        options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY] if suffix == '.jpg' else []
        encoded = cv2.imencode(suffix, picture, options)[1]
        (root / part / split / f'{name}{suffix}').write_bytes(encoded.tobytes())
    return split, np.bincount(labels.ravel(), minlength=max(LABELS.values()) + 1)
