"""What is exported: a config and a checkpoint as networks, and where they are from."""

import copy
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config

from ..checkpoints.download import find_recorded_release, sha256_of_weights
from ..checkpoints.releases import find_release
from ..openmmlab.config import name_of, named_classes
from ..openmmlab.loading import load_segmentor
from ..openmmlab.segmentor import FastEncoderDecoder
from ..utils.errors import UserError
from ..utils.files import sha256_of
from .capture import ExportedBackbone, ExportedSegmentor, Wrapper


class Source(NamedTuple):
    """What is exported."""

    cfg: Config
    config: str
    checkpoint: str  # a file on this machine
    sha256: str  # of that file
    release: dict | None  # that the file is shown to hold, by SHA-256
    original: FastEncoderDecoder  # as trained: in eval mode, nothing folded
    folded: FastEncoderDecoder

    @property
    def crop_size(self) -> tuple[int, int]:
        """(H, W) of the config's training crops, for when no other size is asked for.

        Raises:
            UserError: the config does not say.
        """
        size = self.cfg.get('crop_size')
        if size is None:
            raise UserError(
                'The config has no crop_size. Name the size of the images with --size HEIGHT WIDTH, or with '
                '--cfg-options crop_size=512,512.'
            )
        return tuple(size)

    def fold(self, fuse: str) -> 'Source':
        """The same weights, folded in another way: see :meth:`.DeployableModel.switch_to_deploy`."""
        folded = copy.deepcopy(self.original)
        folded.switch_to_deploy(fuse)
        return self._replace(folded=folded)

    def wrap(self, part: str, output: str, single: bool) -> Wrapper:
        """The folded network, or its backbone, as an exporter takes it."""
        if part == 'backbone':
            return ExportedBackbone(self.folded.backbone)
        return ExportedSegmentor(self.folded, output, single)

    def origin(self) -> dict[str, str]:
        """Where the weights are from: config, file, SHA-256, and the published metrics of a release."""
        metrics = self.release['metrics'] if self.release else {}
        return dict(
            config=name_of(self.config, self.cfg),
            checkpoint=Path(self.checkpoint).name,
            sha256=self.sha256,
            **{f'{metric} (released)': str(value) for metric, value in metrics.items()},
        )

    def describe(self, wrapper: Wrapper, size: tuple[int, int]) -> dict:
        """What a file for images of one size (H, W) says of itself, as JSON has it.

        Its input and outputs, where the weights are from, and the classes of a segmentor.
        """
        height, width = size
        said = dict(height=height, width=width, outputs=list(wrapper.names), origin=self.origin())
        if isinstance(wrapper, ExportedSegmentor):
            classes, palette = named_classes(self.cfg)
            said.update(classes=classes, palette=palette)
        return said

    @property
    def without_figures(self) -> str | None:
        """Why there are no published metrics, where the name of the file promises some."""
        if self.release or not find_release(self.checkpoint):
            return None
        return 'called like a release, but its SHA-256 is not recorded: no published figures'


def load_source(config: str, checkpoint: str, fuse: str, cfg_options: dict | None = None) -> Source:
    """Read and build what is to be exported.

    Raises:
        UserError: no such config or checkpoint, or one that does not fit the other.
    """
    cfg, file, _, original = load_segmentor(config, checkpoint, cfg_options)
    sha256 = sha256_of(file)
    release = find_recorded_release(Path(file).parent, sha256, sha256_of_weights(original.state_dict()))
    return Source(cfg, config, file, sha256, release, original, folded=original).fold(fuse)
