"""What is exported: a config and a checkpoint as networks, and where they are from."""

from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config

from ..engine.checks import check_checkpoint
from ..engine.config import load_segmentor_config
from ..models.builder import build_without_weights
from ..models.segmentor import FastEncoderDecoder
from ..utils.files import sha256_of
from ..weights.releases import find_checkpoint, find_release
from .capture import ExportedBackbone, ExportedSegmentor


class Source(NamedTuple):
    """What is exported."""

    cfg: Config
    config: str
    checkpoint: str  # a file on this machine
    original: FastEncoderDecoder  # as trained: in eval mode, nothing folded
    folded: FastEncoderDecoder

    def wrap(self, part: str, output: str, single: bool = False) -> ExportedSegmentor | ExportedBackbone:
        """The folded network, or its backbone, as an exporter takes it."""
        if part == 'backbone':
            return ExportedBackbone(self.folded.backbone)
        return ExportedSegmentor(self.folded, output, single)

    def describe(self) -> dict[str, str]:
        """Where the weights are from: config, file, SHA-256, and the released metrics of a released file."""
        release = find_release(self.checkpoint) or dict(metrics={})
        return dict(
            config=Path(self.config).stem,
            checkpoint=Path(self.checkpoint).name,
            sha256=sha256_of(self.checkpoint),
            **{f'{metric} (released)': str(value) for metric, value in release['metrics'].items()},
        )


def load_source(config: str, checkpoint: str, fuse: str, cfg_options: dict | None = None) -> Source:
    """Read and build what is to be exported.

    Raises:
        UserError: no such config or checkpoint, or one that does not fit the other.
    """
    cfg = load_segmentor_config(config, cfg_options)
    checkpoint = str(find_checkpoint(checkpoint))
    weights = check_checkpoint(cfg, checkpoint)
    original, folded = (build_without_weights(cfg.model) for _ in range(2))
    for segmentor in (original, folded):
        segmentor.load_state_dict(segmentor.fit(weights))
        segmentor.eval()
    folded.switch_to_deploy(fuse)
    return Source(cfg, config, checkpoint, original, folded)
