"""Pictures: the colours are those that mmseg gives, with whichever release of it."""

import inspect

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer

from projects.recnext.recnext.openmmlab.panel_visualizer import SegPanelVisualizer

CLASSES = ('wall', 'sky', 'tree')
PALETTE = [[120, 120, 120], [6, 230, 230], [4, 200, 3]]


@pytest.fixture
def visualizer():
    visualizer = SegPanelVisualizer('test_visualizer', alpha=0.6)
    visualizer.dataset_meta = dict(classes=CLASSES, palette=PALETTE)
    return visualizer


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize('highest', [3, 256], ids=['classes', 'ignored'])
def test_colours_are_those_of_mmseg(visualizer, image, highest):
    if 'with_labels' not in inspect.signature(SegLocalVisualizer._draw_sem_seg).parameters:
        pytest.skip('this mmseg cannot draw without names')
    labels = PixelData(data=torch.randint(0, highest, (1, 40, 60), generator=torch.Generator().manual_seed(0)))
    expected = visualizer._draw_sem_seg(image, labels, CLASSES, PALETTE, with_labels=False)
    # mmseg cuts fractions off.
    assert np.abs(visualizer._paint(image, labels).astype(int) - expected).max() <= 1


@pytest.mark.parametrize('with_labels', [False, True])
def test_panels_stand_side_by_side(visualizer, image, with_labels, tmp_path):
    labels = PixelData(data=torch.zeros(1, 40, 60, dtype=torch.int64))
    sample = SegDataSample(pred_sem_seg=labels, gt_sem_seg=labels)
    visualizer.add_datasample('one', image, sample, out_file=str(tmp_path / 'one.png'), with_labels=with_labels)
    height, width = visualizer.get_image().shape[:2]
    assert width > 3 * height and (tmp_path / 'one.png').exists()
