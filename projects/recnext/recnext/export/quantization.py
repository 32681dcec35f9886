"""Eight bits in an exported file, of any format: the images on which the ranges of all maps are measured."""

from pathlib import Path

import cv2
import numpy as np

from ..runtimes.calibration import Calibration, check_patterns, choose_images, images_in
from ..samples.scenes import make_scene
from ..utils.images import read_image
from .backend import ExportOptions
from .capture import Wrapper
from .images import list_samples
from .source import Source
from .verification import inputs_of

DRAWN = range(1000, 1032)
"""Seeds of the scenes that are drawn where there are no images; none of them is a scene to verify with."""


def find_calibration(source: Source, wrapper: Wrapper, options: ExportOptions, size: tuple[int, int]) -> Calibration:
    """The images to calibrate with: of a folder, else of the config's training set, else drawn scenes.

    Args:
        source: Its config names the training set.
        wrapper: What is exported: has the modules that may be kept in floating point.
        options: Name the folder and the modules.
        size: (H, W), to which the images are stretched.

    Raises:
        UserError: a folder without images, or a pattern that no module fits.
    """
    check_patterns(wrapper, options.keep_float)

    def load(image: Path | int) -> np.ndarray:
        pixels = make_scene(image)[0] if isinstance(image, int) else read_image(image)
        resized = cv2.resize(pixels, size[::-1])[..., ::-1]
        return inputs_of(source.original, options.part, resized)

    if options.calibrate is not None:
        images, place = images_in(Path(options.calibrate)), options.calibrate
    else:
        training = source.cfg.get('train_dataloader')  # a segmentor from the hub has none
        samples = list_samples(training.dataset) if training else ()
        images = sorted(Path(sample['img_path']) for sample in samples)
        place = 'the training set'
    if not images:
        return Calibration(f'{len(DRAWN)} drawn scenes', DRAWN, load, options.keep_float)
    named, chosen = choose_images(images, place)
    return Calibration(named, chosen, load, options.keep_float)
