"""The small segmentors that these tests export, and the pictures that they are calibrated with."""

import functools
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
from helpers.exports import picture, write_tiny


@pytest.fixture(scope='module')
def tiny_of(tmp_path_factory) -> Callable[[str], tuple[str, str]]:
    """Config and checkpoint of the small segmentor with a token mixer, ``conv`` or ``attn``."""
    return functools.cache(lambda mixer: write_tiny(tmp_path_factory.mktemp(mixer), mixer))


@pytest.fixture(scope='module')
def tiny(tiny_of) -> tuple[str, str]:
    """For what is the same for both."""
    return tiny_of('conv')


@pytest.fixture(scope='module')
def few(tmp_path_factory) -> tuple[str, str]:
    """Config and checkpoint of a small segmentor of three classes, whose labels 8 bits can keep."""
    return write_tiny(tmp_path_factory.mktemp('few'), 'conv', classes=3)


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """A folder of four pictures to calibrate with."""
    folder = tmp_path_factory.mktemp('photos')
    for seed in range(4):
        cv2.imwrite(str(folder / f'{seed}.png'), picture((80, 96), 20 + seed))
    return folder
