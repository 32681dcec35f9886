"""Prediction for images that need no annotation: a file or an array in, labels, areas and a picture out."""

import dataclasses
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from PIL import Image

from ..checkpoints.convert import convert_meta
from ..checkpoints.hub import SCHEME
from ..drawing.overlay import draw_overlay
from ..openmmlab.config import named_classes, test_set
from ..openmmlab.loading import load_segmentor
from ..runtimes.deployment import DEFAULT, Deployment, deploy
from ..utils.devices import AUTO, find_device, out_of_memory
from ..utils.errors import UserError
from ..utils.files import sha256_of
from ..utils.images import ImageError, read_image
from .find import find_trained

MAX_NETWORK_PIXELS = 2**24
"""Of an image as the network sees it; RecNeXt-M3 takes 5 GB for so many."""


class Area(NamedTuple):
    """How much of an image one class covers."""

    label: int
    name: str
    pixels: int
    share: float  # of all pixels, from 0 to 1


@dataclass(frozen=True)
class Prediction:
    """What was predicted for one image.

    Args:
        image: (H, W, 3), BGR, uint8.
        labels: (H, W), index of the class of every pixel; uint8, or uint16 where there are more than 256 classes.
        classes: Names of all classes.
        palette: (classes, 3), RGB, uint8.
    """

    image: np.ndarray
    labels: np.ndarray
    classes: Sequence[str]
    palette: np.ndarray

    @cached_property
    def areas(self) -> list[Area]:
        """The classes in the image, the largest first."""
        # By parts: bincount makes a copy in eight bytes a pixel.
        parts = np.array_split(self.labels.ravel(), self.labels.size // 2**20 + 1)
        return list_areas(sum(np.bincount(part, minlength=len(self.classes)) for part in parts), self.classes)

    def label_image(self) -> Image.Image:
        """The labels as an image in palette mode, whose stored values are the indices; 16-bit grey if they need it."""
        image = Image.fromarray(self.labels)
        if self.labels.dtype == np.uint8:
            image.putpalette(self.palette.tobytes())
        return image

    def overlay(self, rows: int | None = None) -> Image.Image:
        """The image in the colours of its classes, over a legend of them with their shares.

        Args:
            rows: Of the legend; None means as many as it takes.
        """
        legend = [(area.name, self.palette[area.label], area.share) for area in self.areas]
        return draw_overlay(self.image, self.labels, self.palette, legend, rows)

    def labels_png(self) -> bytes:
        """The label image as a file."""
        return _encode(self.label_image(), 'PNG')

    def overlay_jpeg(self) -> bytes:
        """The overlay as a file."""
        return _encode(self.overlay(), 'JPEG', quality=90)

    def report(self) -> dict:
        """``width``, ``height`` and ``areas``, for JSON."""
        height, width = self.labels.shape
        return dict(width=width, height=height, areas=[area._asdict() for area in self.areas])


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def list_areas(counts: np.ndarray, classes: Sequence[str]) -> list[Area]:
    """Areas from the pixels of every class, the largest first, without those that are absent."""
    total = int(counts.sum())
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda label: (-counts[label], label))
    return [Area(label, classes[label], int(counts[label]), round(int(counts[label]) / total, 6)) for label in order]


class PreparedImage(NamedTuple):
    """An image that is ready for the network."""

    image: np.ndarray  # (H, W, 3), BGR, uint8
    data: dict  # what the config's test pipeline made of it


class Predictor:
    """A trained segmentor, in the form in which it is fastest, that takes images.

    Args:
        config: Path of the config, or the name of a release.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        device: Such as ``'cuda:1'``; see :func:`device.find_device`.
        deployment: The form in which the network is run.
        cfg_options: Merged into the config.

    Raises:
        UserError: no such device, config or checkpoint, or one that does not fit the other.
    """

    def __init__(
        self,
        config: str | Path,
        checkpoint: str | Path,
        device: str | torch.device = AUTO,
        deployment: Deployment = DEFAULT,
        cfg_options: dict | None = None,
    ) -> None:
        device = find_device(device)
        cfg, checkpoint, content, self.segmentor = load_segmentor(config, checkpoint, cfg_options)
        self.segmentor.to(device)
        deploy(self.segmentor, deployment)
        pipeline = make_pipeline(cfg)
        self.pipeline = Compose(pipeline)
        self.classes, self.palette = classes_of(cfg, content, self.segmentor.num_classes)
        seen = json.dumps([cfg.model, pipeline, self.classes, self.palette.tolist()], default=str)
        self.made_with = dict(
            config=Path(cfg.filename).stem,
            network_and_pipeline=hashlib.sha256(seen.encode()).hexdigest(),
            checkpoint=Path(checkpoint).name,
            sha256=sha256_of(checkpoint),
            **dataclasses.asdict(deployment),
        )
        """What decides the predictions, for a person to read and for a restarted run to compare."""

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        revision: str | None = None,
        device: str | torch.device = AUTO,
        deployment: Deployment = DEFAULT,
    ) -> 'Predictor':
        """A segmentor that brings its own weights, downloaded first if they are not there.

        Args:
            name: ``'user/name'`` on the Hugging Face hub; a released one such as ``'recnext_m3_ade20k'``; or a folder
                with the files of either's repository.
            revision: Branch, tag or commit on the hub; None means the newest.
            device: See :class:`Predictor`.
            deployment: See :class:`Predictor`.

        Raises:
            UserError: there is none of that name; or it is refused, as config and weights from strangers may be.
        """
        name = str(name)
        if revision or (name.count('/') == 1 and not Path(name).is_dir()):
            name = SCHEME + name.removeprefix(SCHEME) + (f'@{revision}' if revision else '')
        return cls(*find_trained(name), device=device, deployment=deployment)

    def __call__(self, image: str | Path | np.ndarray) -> Prediction:
        """Predict one image.

        Args:
            image: A file, or (H, W, 3), BGR, uint8, as cv2 reads it.

        Raises:
            ImageError: it cannot be read, or is too large.
        """
        return self.predict([self.prepare(image)])[0]

    def prepare(self, image: str | Path | bytes | np.ndarray, name: str | None = None) -> PreparedImage:
        """Read an image and bring it through the test pipeline of the config; may run in several threads.

        Args:
            image: As for a call; or the content of a file.
            name: What messages call it; None means the path.
        """
        name = name or (str(image) if isinstance(image, str | Path) else 'The image')
        pixels = image if isinstance(image, np.ndarray) else read_image(image, name)
        try:
            data = self.pipeline(dict(img=pixels))
        except Exception as error:  # cv2's and whatever a pipeline of the user's raises
            raise ImageError(f'{name} does not go through the test pipeline: {type(error).__name__}: {error}') from None
        height, width = data['inputs'].shape[-2:]
        if height * width > MAX_NETWORK_PIXELS:
            raise ImageError(
                f'{name} reaches the network as {width} × {height} pixels; expected at most '
                f'{MAX_NETWORK_PIXELS / 1e6:.0f} million. Cut it into parts, or put Resize in the test pipeline.'
            )
        return PreparedImage(pixels, data)

    @torch.no_grad()
    def predict(self, batch: Sequence[PreparedImage]) -> list[Prediction]:
        """Predict images together; those of one size go through the network at once."""
        try:
            samples = self.segmentor.test_step(pseudo_collate([prepared.data for prepared in batch]))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            sizes = ', '.join('{1} × {0}'.format(*prepared.image.shape) for prepared in batch)
            raise ImageError(f'The device has too little memory for {len(batch)} images of {sizes} pixels.') from None
        kind = torch.uint8 if len(self.classes) <= 256 else torch.uint16
        labels = [sample.pred_sem_seg.data[0].to(kind).cpu().numpy() for sample in samples]
        return [Prediction(prepared.image, map_, self.classes, self.palette) for prepared, map_ in zip(batch, labels)]


def make_pipeline(cfg: Config) -> list[dict]:
    """The transforms of a config's test set, for an image in memory and without annotation.

    Raises:
        UserError: it does not begin with an image read from a file.
    """
    load, *rest = test_set(cfg).pipeline
    if load['type'] != 'LoadImageFromFile':
        raise UserError(f'The test pipeline begins with {load["type"]}; expected LoadImageFromFile.')
    return [{**load, 'type': 'LoadImageFromNDArray'}, *(step for step in rest if step['type'] != 'LoadAnnotations')]


def classes_of(cfg: Config, checkpoint: dict, number: int) -> tuple[list[str], np.ndarray]:
    """Names and colours of the classes: as the checkpoint says, or else as the test set of the config does."""
    meta = convert_meta(checkpoint.get('meta'), 'mmseg1').get('dataset_meta', {})
    classes, palette = meta.get('classes', ()), meta.get('palette')
    if palette is None or not len(classes) == len(palette) == number:
        classes, palette = named_classes(cfg)
    if len(classes) != number:
        raise UserError(f'The head has {number} classes, and the test set of the config names {len(classes)}.')
    return [name.strip() for name in classes], np.array(palette, np.uint8)
