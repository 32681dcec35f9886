"""The name of before for :func:`.model.load`, for one release: arrays are BGR here."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..checkpoints.folder import HUB
from ..drawing.overlay import draw_overlay
from ..runtimes.deployment import DEFAULT, Deployment
from ..utils.devices import AUTO
from .model import PreparedImage, load_deployed
from .prediction import Prediction


class Predictor:
    """A trained segmentor that takes and gives images in BGR. Deprecated: :func:`.model.load` has RGB.

    Args:
        config: Path of the config, or the name of a release.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        device: Such as ``'cuda:1'``.
        deployment: The form in which the network is run.
        cfg_options: Merged into the config.

    Raises:
        UserError: no such device, config or checkpoint, or one that does not fit the other.
    """

    def __init__(
        self,
        config: str | Path,
        checkpoint: str | Path | None,
        device: str | torch.device = AUTO,
        deployment: Deployment = DEFAULT,
        cfg_options: dict | None = None,
    ) -> None:
        warnings.warn(
            'Predictor, with images in BGR, goes in the next release: recnext.load(...) has them in RGB.',
            FutureWarning,
            stacklevel=2,
        )
        self.model = load_deployed(config, checkpoint, device, deployment, cfg_options)
        self.classes, self.palette = self.model.classes, self.model.palette

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        revision: str | None = None,
        device: str | torch.device = AUTO,
        deployment: Deployment = DEFAULT,
    ) -> 'Predictor':
        """Load a segmentor that brings its own weights: ``'user/name'`` on the hub, a release, or a folder."""
        name = str(name)
        if revision or (name.count('/') == 1 and not Path(name).is_dir()):
            name = HUB + name.removeprefix(HUB) + (f'@{revision}' if revision else '')
        return cls(name, None, device, deployment)

    def __call__(self, image: str | Path | np.ndarray) -> Prediction:
        """Predict one image: a file, or (H, W, 3), BGR, uint8, as cv2 reads it."""
        return self.predict([self.prepare(image)])[0]

    def prepare(self, image: str | Path | bytes | np.ndarray, name: str | None = None) -> PreparedImage:
        """Bring an image into the size of the network."""
        return self.model.prepare(image[..., ::-1] if isinstance(image, np.ndarray) else image, name)

    def predict(self, batch: Sequence[PreparedImage]) -> list[Prediction]:
        """Predict prepared images together."""
        return [_BgrPrediction(**{**_fields(one), 'image': one.image[..., ::-1]}) for one in self.model.predict(batch)]


class _BgrPrediction(Prediction):
    def overlay(self, rows: int | None = None) -> Image.Image:
        legend = [(area.name, self.palette[area.label], area.share) for area in self.areas]
        return draw_overlay(self.image[..., ::-1], self.labels, self.palette, legend, rows)


def _fields(prediction: Prediction) -> dict:
    return {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}
