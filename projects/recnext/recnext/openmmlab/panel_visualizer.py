"""A visualizer whose pictures have image, ground truth and prediction side by side over a legend."""

from pathlib import Path

import mmcv
import numpy as np
from mmengine.dist import master_only
from mmengine.structures import PixelData
from mmseg.registry import VISUALIZERS
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer

from ..drawing.overlay import mix

PANEL_INCHES = 4.5
DPI = 100
LEGEND_COLUMNS = 6


@VISUALIZERS.register_module()
class SegPanelVisualizer(SegLocalVisualizer):
    """mmseg's visualizer with the untouched image beside the overlays, and a legend instead of labels on the masks.

    Args:
        picture_dir: Folder for the pictures; None leaves them to the backends.
        **kwargs: As for mmseg's SegLocalVisualizer.
    """

    def __init__(self, name: str = 'visualizer', picture_dir: str | None = None, **kwargs: object) -> None:
        super().__init__(name, **kwargs)
        self.picture_dir = picture_dir

    @master_only
    def add_datasample(
        self,
        name: str,
        image: np.ndarray,
        data_sample: SegDataSample | None = None,
        draw_gt: bool = True,
        draw_pred: bool = True,
        show: bool = False,
        wait_time: float = 0,
        out_file: str | None = None,
        step: int = 0,
        with_labels: bool = False,
    ) -> None:
        """Draw one sample, then show it, write it to ``out_file`` or hand it to the backends.

        Args:
            name: Title and identifier.
            image: (H, W, 3), RGB, uint8.
            data_sample: With ``gt_sem_seg`` and/or ``pred_sem_seg``, each (1, H, W).
            draw_gt: Whether to draw the ground truth.
            draw_pred: Whether to draw the prediction.
            show: Open a window instead of writing.
            wait_time: Seconds that the window stays; 0 means until a key is pressed.
            out_file: Where to write the picture.
            step: Iteration, for the backends.
            with_labels: Class names on the masks as well.
        """
        classes, palette = self.dataset_meta['classes'], self.dataset_meta['palette']
        wanted = (('truth', 'gt_sem_seg', draw_gt), ('prediction', 'pred_sem_seg', draw_pred))
        panels, present = [('image', image)], set()
        for title, field, draw in wanted:
            if draw and data_sample is not None and field in data_sample:
                labels = data_sample.get(field)
                # mmseg writes names on the masks unless told otherwise, before 1.1 never.
                drawn = (
                    self._draw_sem_seg(image, labels, classes, palette) if with_labels else self._paint(image, labels)
                )
                panels.append((title, drawn))
                present.update(np.unique(labels.data.cpu()).tolist())
        legend = [(classes[label], palette[label]) for label in sorted(present) if label < len(classes)]
        picture = draw_panels(name, panels, legend)
        self.set_image(picture)
        if out_file is None and self.picture_dir is not None:
            out_file = str(Path(self.picture_dir, name).with_suffix('.png'))
        if show:
            self.show(picture, win_name=name, wait_time=wait_time)
        if out_file is not None:
            mmcv.imwrite(mmcv.rgb2bgr(picture), out_file)
        elif not show:
            self.add_image(name, picture, step)

    def _paint(self, image: np.ndarray, labels: PixelData) -> np.ndarray:
        """The image in the colours of its classes, and black where a pixel has none; (H, W, 3) uint8 like the image."""
        palette = np.array(self.dataset_meta['palette'], np.uint8)
        indices = np.minimum(np.asarray(labels.data.cpu())[0].astype(np.int64), len(palette))
        colours = np.concatenate((palette, np.zeros((1, 3), np.uint8)))[indices]
        return mix(image, colours, self.alpha)


def draw_panels(
    title: str, panels: list[tuple[str, np.ndarray]], legend: list[tuple[str, tuple[int, int, int]]]
) -> np.ndarray:
    """Set pictures of one size side by side over a legend.

    Args:
        title: Of the whole.
        panels: Caption and (H, W, 3) RGB uint8 picture of each.
        legend: Class name and RGB colour of each.

    Returns:
        (H', W', 3) RGB uint8.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    height, width = panels[0][1].shape[:2]
    rows = -(-len(legend) // LEGEND_COLUMNS)
    top, bottom = 0.7, 0.3 + 0.25 * rows
    panel_height = PANEL_INCHES * min(height / width, 3)
    figure = Figure(figsize=(PANEL_INCHES * len(panels), panel_height + top + bottom), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    total = panel_height + top + bottom
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.subplots_adjust(left=0.01, right=0.99, bottom=bottom / total, top=1 - top / total, wspace=0.02)
    for axis, (caption, picture) in zip(axes, panels):
        axis.imshow(picture)
        axis.set_title(caption, fontsize=10)
        axis.axis('off')
    if legend:
        patches = [Patch(color=np.array(colour) / 255, label=name.strip()) for name, colour in legend]
        figure.legend(handles=patches, loc='lower center', ncols=LEGEND_COLUMNS, fontsize=9, frameon=False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
