"""Preprocessing against mmseg's pipeline and preprocessor: the same sizes, the same bytes, the same numbers."""

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmseg.registry import MODELS, TRANSFORMS

from projects.recnext.recnext.models.ade20k import ade20k_classes
from projects.recnext.recnext.models.preprocess import Preprocess

SIZES = [
    (1, 1), (1, 2), (2, 1), (3, 5), (31, 33), (32, 32), (64, 96), (97, 61), (512, 512), (512, 683), (683, 512),
    (500, 333), (480, 641), (2, 300), (300, 2), (1, 900), (1, 5000), (11, 2048), (1023, 1025), (600, 2400), (900, 17),
]  # fmt: skip
SCALES = ((2048, 512), (512, 2048), (2048, 513), (333, 100), (64, 64), None)


def pipeline(preprocess: Preprocess) -> list:
    """What a config says instead, in mmseg's words."""
    resize = [] if preprocess.scale is None else [dict(type='Resize', scale=preprocess.scale, keep_ratio=True)]
    steps = [*resize, dict(type='ResizeToMultiple', size_divisor=preprocess.multiple)]
    return [TRANSFORMS.build(step) for step in steps]


def by_mmseg(preprocess: Preprocess, image: np.ndarray) -> np.ndarray:
    results = dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
    for step in pipeline(preprocess):
        results = step(results)
    return results['img']


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * 10_000 + width).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize('scale', SCALES)
def test_thousands_of_sizes(scale):
    preprocess = Preprocess(scale)
    generator = np.random.default_rng(0)
    sides = np.exp(generator.uniform(0, np.log(9000), (5000, 2))).astype(int)  # of every order of magnitude
    for height, width in [*sides.tolist(), *SIZES]:
        kept = (width, height) if scale is None else mmcv.rescale_size((width, height), scale)
        stretched = tuple(-(-side // 32) * 32 for side in kept)
        assert preprocess.sizes(height, width) == [kept[::-1], stretched[::-1]]


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('multiple', [32, pytest.param(7, marks=pytest.mark.full), 1])
def test_the_bytes_are_those_of_mmsegs_pipeline(scale, multiple):
    preprocess = Preprocess(scale, multiple)
    seen = set()
    for size in SIZES:
        image = noise(*size)
        if 0 in preprocess.sizes(*size)[0]:  # so narrow that it loses a side
            for resize in (preprocess.resize, lambda image: by_mmseg(preprocess, image)):
                with pytest.raises(cv2.error):
                    resize(image)
            continue
        ours = preprocess.resize(image)
        assert ours.dtype == np.uint8 and np.array_equal(ours, by_mmseg(preprocess, image)), size
        # Channel by channel: it makes no difference in which order they are.
        assert np.array_equal(preprocess.resize(image[..., ::-1])[..., ::-1], ours)
        seen.add(ours.shape)
    assert len(seen) > 2


@pytest.mark.parametrize('channels', [1, 4, 6])
def test_any_number_of_channels(channels):
    image = noise(50, 70, channels)
    resized = Preprocess().resize(image)
    assert resized.shape == (512, 736, channels)
    for channel in range(channels):
        assert np.array_equal(resized[..., channel], Preprocess().resize(image[..., channel : channel + 1])[..., 0])


def test_what_the_network_sees_is_what_mmseg_gives_it():
    """The same photo, read in RGB here and in BGR there."""
    preprocess, photo = Preprocess(), noise(120, 171)
    prepared = preprocess.prepare(photo)
    assert prepared.size == (120, 171) and prepared.inputs.dtype == torch.uint8 and prepared.inputs.is_contiguous()
    preprocessor = MODELS.build(
        dict(type='SegDataPreProcessor', mean=preprocess.mean, std=preprocess.std, bgr_to_rgb=True)
    )
    bgr = np.ascontiguousarray(by_mmseg(preprocess, photo[..., ::-1]).transpose(2, 0, 1))
    theirs = preprocessor(dict(inputs=[torch.from_numpy(bgr)]))['inputs']
    ours = preprocess.normalise(prepared.inputs[None])
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)


def test_ade20k_is_that_of_mmseg():
    from mmseg.datasets import ADE20KDataset

    names, palette = ade20k_classes()
    assert names == tuple(ADE20KDataset.METAINFO['classes'])
    assert palette == tuple(map(tuple, ADE20KDataset.METAINFO['palette']))
