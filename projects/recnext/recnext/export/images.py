"""Images of the config's own sets: to verify a file with, and to calibrate one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.registry import TRANSFORMS, init_default_scope
from mmseg.registry import DATASETS

from ..openmmlab.listing import leaves, spread
from ..samples.scenes import make_scene
from ..utils.errors import UserError

NUMBER = 3
"""Images to verify with."""

ANNOTATED = 100
"""Images to measure mIoU with, at most: evenly spread over the test set."""


class Images(NamedTuple):
    """Images to verify with."""

    named: str  # what they are, for a person to read
    images: list[np.ndarray]  # (H, W, 3) in BGR, as cv2 reads them
    annotations: Sequence[np.ndarray] = ()  # (H, W), the class of every pixel; none where they are not known


def find_images(cfg: Config, paths: Sequence[str] | None, annotated: bool = False) -> Images:
    """Images to verify with.

    Args:
        cfg: Its test set is taken where there are no paths and it is there; otherwise scenes are drawn.
        paths: Image files.
        annotated: Take more of the test set, and the annotations of what is in it, to measure mIoU.

    Raises:
        UserError: a file that is no image.
    """
    samples = list(list_samples(cfg.test_dataloader.dataset)) if cfg.get('test_dataloader') else []
    if paths:
        known = {Path(sample['img_path']).resolve(): sample for sample in samples}
        samples = [known.get(Path(path).resolve(), dict(img_path=str(path))) for path in paths]
    else:
        indices = spread(len(samples), ANNOTATED) if annotated else range(len(samples))[:NUMBER]
        samples = [samples[index] for index in indices]
    if not samples:
        drawn = [make_scene(seed)[0][..., ::-1].copy() for seed in range(NUMBER)]
        return Images(f'{NUMBER} drawn scenes', drawn)
    files = [sample['img_path'] for sample in samples]
    images = [cv2.imread(file, cv2.IMREAD_COLOR) if Path(file).is_file() else None for file in files]
    unreadable = [file for file, image in zip(files, images) if image is None]
    if unreadable:
        raise UserError(f'Not an image: {", ".join(unreadable)}')
    named = f'{len(images)} images ({Path(files[0]).name}{", ..." if len(images) > 1 else ""})'
    maps = [sample['load']() for sample in samples if 'load' in sample] if annotated else []
    return Images(named, images, maps if len(maps) == len(images) else ())


def list_samples(dataset: ConfigDict) -> Iterator[dict]:
    """The samples of a dataset of a config, nothing where it is not there.

    Each has its ``img_path``, and where there are annotations ``load()`` for its label map (H, W).
    """
    init_default_scope('mmseg')
    for leaf in leaves(dataset):
        loaders = [step for step in leaf.get('pipeline', ()) if step['type'] == 'LoadAnnotations']
        try:
            built = DATASETS.build({**leaf, 'pipeline': [], 'lazy_init': False})
        except (OSError, ValueError):  # mmengine's, for a list of nothing
            continue
        for index in range(len(built)):
            sample = built.get_data_info(index)
            if loaders and Path(sample.get('seg_map_path') or '').is_file():
                sample['load'] = _Annotation(loaders[0], sample)
            yield sample


class _Annotation:
    """The label map of one sample, read when it is called for."""

    def __init__(self, loader: ConfigDict, sample: dict) -> None:
        self.loader, self.sample = loader, dict(sample)

    def __call__(self) -> np.ndarray:
        return TRANSFORMS.build(self.loader)(dict(self.sample))['gt_seg_map']
