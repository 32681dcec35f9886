"""A trained segmentor of any mmseg config, made sure to fit its checkpoint, and as a Model runs it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import Tensor

from ..checkpoints.files import read_checkpoint
from ..checkpoints.folder import Description
from ..checkpoints.keys import read_classes
from ..checkpoints.releases import resolve_checkpoint
from ..utils.errors import UserError
from ..utils.files import sha256_of
from .builder import build_without_weights
from .checks import check_fit
from .config import load_segmentor_config, named_classes, test_set
from .describe import describe
from .segmentor import FastEncoderDecoder


class TrainedSegmentor(NamedTuple):
    """What :func:`load_segmentor` gives."""

    cfg: Config
    checkpoint: str  # a file on this machine
    content: dict  # what it holds
    network: FastEncoderDecoder  # in eval mode, on the CPU


def load_segmentor(config: str | Path, checkpoint: str | Path, cfg_options: dict | None = None) -> TrainedSegmentor:
    """Read and build a trained segmentor.

    Args:
        config: Path of the config, or the name of a release.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        cfg_options: Merged into the config.

    Raises:
        UserError: no such config or checkpoint, or one that does not fit the other.
    """
    cfg = load_segmentor_config(config, cfg_options)
    file = str(resolve_checkpoint(str(checkpoint)))
    content = read_checkpoint(file)
    network = build_without_weights(cfg.model)
    network.load_checked(check_fit(network, file, content))
    return TrainedSegmentor(cfg, file, content, network.eval())


class PipelineInputs(NamedTuple):
    """What a test pipeline makes of an image."""

    inputs: Tensor  # (3, h, w)
    data_samples: object


class ConfiguredSegmentor:
    """Images to label maps by the network and the test pipeline of a config.

    Args:
        network: In eval mode.
        pipeline: For an image in memory, without annotation.
    """

    def __init__(self, network: FastEncoderDecoder, pipeline: list[dict]) -> None:
        self.network = network
        self.pipeline = Compose(pipeline)

    def prepare(self, image: np.ndarray) -> PipelineInputs:
        """Bring an image (H, W, 3), RGB, uint8, through the pipeline, which has it in BGR as mmcv reads it."""
        return PipelineInputs(**self.pipeline(dict(img=np.ascontiguousarray(image[..., ::-1]))))

    def label_maps(self, batch: Sequence[PipelineInputs]) -> list[Tensor]:
        """Return the label map (H, W) of each image in its original size."""
        samples = self.network.test_step(pseudo_collate([one._asdict() for one in batch]))
        return [sample.pred_sem_seg.data[0] for sample in samples]


class Configured(NamedTuple):
    """What :func:`load_configured` gives: the arguments of :class:`.predict.model.Model`."""

    network: FastEncoderDecoder
    segmenter: ConfiguredSegmentor
    classes: list[str]
    palette: np.ndarray
    provenance: dict
    description: Description | None  # None where the schema does not cover the config


def load_configured(config: str | Path, checkpoint: str | Path | None, cfg_options: dict | None = None) -> Configured:
    """Load the segmentor of a config for prediction.

    Raises:
        UserError: no such config or checkpoint, or one that does not fit the other.
    """
    if checkpoint is None:
        load_segmentor_config(config, cfg_options)  # what is wrong with it comes first
        raise UserError(f'{config} is a config, which brings no weights. Name a checkpoint after it.')
    cfg, file, content, network = load_segmentor(config, checkpoint, cfg_options)
    pipeline = make_pipeline(cfg)
    classes, palette = classes_of(cfg, content, network.num_classes)
    seen = json.dumps([cfg.model, pipeline, classes, palette.tolist()], default=str)
    provenance = dict(
        model=Path(cfg.filename).stem,
        network_and_pipeline=hashlib.sha256(seen.encode()).hexdigest(),
        checkpoint=Path(file).name,
        sha256=sha256_of(file),
    )
    source = dict(file=Path(file).name, file_sha256=provenance['sha256'])
    try:
        description = replace(describe(cfg, network, classes, palette), provenance=source)
    except UserError:
        description = None
    segmenter = ConfiguredSegmentor(network, pipeline)
    return Configured(network, segmenter, classes, palette, provenance, description)


def make_pipeline(cfg: Config) -> list[dict]:
    """Return the transforms of a config's test set, for an image in memory and without annotation.

    Raises:
        UserError: it does not begin with an image read from a file.
    """
    load, *rest = test_set(cfg).pipeline
    if load['type'] != 'LoadImageFromFile':
        raise UserError(f'The test pipeline begins with {load["type"]}; expected LoadImageFromFile.')
    return [{**load, 'type': 'LoadImageFromNDArray'}, *(step for step in rest if step['type'] != 'LoadAnnotations')]


def classes_of(cfg: Config, checkpoint: dict, number: int) -> tuple[list[str], np.ndarray]:
    """Return names and colours of the classes: as the checkpoint says, or else as the test set of the config does."""
    named, coloured = read_classes(checkpoint, number)
    classes, palette = (named, coloured) if named and coloured else named_classes(cfg)
    classes = named or classes
    if len(classes) != number:
        raise UserError(f'The head has {number} classes, and the test set of the config names {len(classes)}.')
    return [name.strip() for name in classes], np.array(palette, np.uint8)
