"""A trained segmentor: its config and checkpoint, made sure to fit each other, as a network."""

from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config

from ..checkpoints.files import read_checkpoint
from ..checkpoints.releases import resolve_checkpoint
from .builder import build_without_weights
from .checks import check_fit
from .config import load_segmentor_config
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
