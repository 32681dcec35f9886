"""Colours over an image, against the arithmetic in whole numbers."""

import numpy as np
import pytest

from projects.recnext.recnext.drawing.overlay import draw_overlay, mix, paint

GENERATOR = np.random.default_rng(0)
IMAGE = GENERATOR.integers(0, 256, (40, 60, 3), dtype=np.uint8)
PALETTE = np.array([[120, 120, 120], [6, 230, 230], [4, 200, 3]], np.uint8)


@pytest.mark.parametrize('percent', [0, 30, 50, 100])
def test_mixing_is_the_weighted_mean(percent):
    colours = GENERATOR.integers(0, 256, IMAGE.shape, dtype=np.uint8)
    hundredfold = IMAGE.astype(int) * (100 - percent) + colours.astype(int) * percent
    mixed = mix(IMAGE, colours, percent / 100)
    assert mixed.dtype == np.uint8 and np.abs(100 * mixed.astype(int) - hundredfold).max() <= 51


def test_pixels_without_a_class_stay_as_they_are():
    labels = GENERATOR.choice([0, 1, 2, 3, 255], IMAGE.shape[:2])
    painted = paint(IMAGE, labels, PALETTE)
    for label in (3, 255):
        assert np.array_equal(painted[labels == label], IMAGE[labels == label])
    for label, colour in enumerate(PALETTE.astype(int)):
        there = labels == label
        assert np.abs(2 * painted[there].astype(int) - IMAGE[there] - colour).max() <= 1


def test_the_legend_names_every_class_and_long_names_are_cut():
    image, labels = np.full((200, 600, 3), 100, np.uint8), np.zeros((200, 600), np.uint8)
    palette = np.array([[255, 0, 0], [0, 255, 0]], np.uint8)
    picture = np.array(draw_overlay(image, labels, palette, [('a' * 200, palette[0], 1.0), ('b', palette[1], 0.0)]))
    assert picture.shape[1] == 600 and picture.shape[0] > 200
    assert (picture[:200] == (178, 50, 50)).all()
    legend = picture[200:].reshape(-1, 3)
    assert all((legend == colour).all(1).any() for colour in palette)
    without = np.array(draw_overlay(image, labels, palette, []))
    assert picture.shape[0] > without.shape[0]


def test_a_large_image_is_drawn_smaller():
    image, labels = np.zeros((100, 9000, 3), np.uint8), np.zeros((100, 9000), np.uint8)
    picture = draw_overlay(image, labels, np.array([[9, 9, 9]], np.uint8), [])
    assert picture.width == 4096
