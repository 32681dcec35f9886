"""What a run needs, looked for before anything is built or written: data, weights to start from, checkpoints.

The network that the checks compare with has no values (:func:`.build_on_meta`). A run builds it once and hands it to
each check, and what a check has read and adapted is loaded without being read or checked again.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from torch import Tensor, nn

from ..checkpoints.files import read_checkpoint
from ..checkpoints.keys import Conversion, ConversionError
from ..checkpoints.releases import resolve_checkpoint
from ..utils.errors import UserError
from .builder import drop_pretrained
from .config import is_segmentor, point_at_data
from .deployable import DeployableModel
from .listing import check_before_run, leaves
from .pretrained import StrictlyPretrained, pretrained_files, read_foreign_weights, read_pretrained
from .resume import read_newest

TRAINING_STATE = ('meta', 'optimizer', 'message_hub')
"""What a checkpoint holds beside the weights if training can go on from it."""


@dataclass
class Start:
    """What a run begins with, as the checks have read it."""

    path: Path | None = None
    content: dict = field(default_factory=dict)
    """What the checkpoint holds; its ``state_dict`` under the network's names."""
    other_classes: bool = False
    """Whether the classifier may be missing in it."""
    backbone: Conversion | None = None
    """Or weights of the backbone alone."""
    notes: list[str] = field(default_factory=list)
    """For the log of the run."""

    def pop(self) -> dict:
        """Return the content and release this reference to it: it may be larger than the network."""
        content, self.content = self.content, {}
        return content


def set_data_root(cfg: Config, data_root: str | None, splits: Iterable[str], num_classes: int) -> None:
    """Point the datasets of ``splits`` at ``data_root``, or at where the config's own is found, and check them.

    Args:
        cfg: Of the run; changed in place.
        data_root: Folder of the dataset; None means the config's.
        splits: Such as ``'train'``.
        num_classes: Classes of the network.

    Raises:
        UserError: there are no images, images without an annotation, or annotations for other classes.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in leaves(loader.dataset) if loader else ():
            point_at_data(dataset, data_root)
            check_before_run(dataset, split, num_classes, is_segmentor(cfg))


def choose_weights(cfg: Config, resume: str | None, meta_model: nn.Module) -> Start:
    """Decide what training starts from, and make sure that it is there and fits.

    Args:
        cfg: Of the run; changed in place. ``cfg.resume`` says afterwards whether training goes on.
        resume: See :class:`.TrainOptions`; the config's own ``resume`` counts where it is None.
        meta_model: The network of ``cfg``, on the ``meta`` device.

    Raises:
        UserError: a file is missing, does not fit, or holds no training state to go on from.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    start = _find_resumed(cfg, resume) if resume else None
    cfg.resume = start is not None
    if start:
        missing = [key for key in TRAINING_STATE if key not in start.content]
        adapt(start, meta_model)
        if missing:
            raise UserError(
                f'{start.path} holds weights, but no {" and no ".join(missing)} to go on from.\n'
                f'  To start a new run from these weights: --cfg-options load_from={start.path}'
            )
    elif cfg.get('load_from'):
        start = read_start(cfg.load_from)
        adapt(start, meta_model, other_classes=True)
    else:
        read_foreign_weights(cfg.model)
        return Start(backbone=_read_backbone(meta_model))
    drop_pretrained(cfg.model)  # all weights come from the checkpoint
    cfg.load_from = str(start.path)
    return start


def _find_resumed(cfg: Config, resume: str) -> Start | None:
    """Read the checkpoint to go on from; None where there is none yet: a fresh start."""
    if resume != 'auto':
        return read_start(resume)
    newest = read_newest(cfg)
    if newest is None:
        return None
    path, content, damaged = newest
    return Start(
        path, content, notes=[f'{" ".join(map(str, damaged))} Training goes on from {path}.'] if damaged else []
    )


def read_start(checkpoint: str) -> Start:
    """Read the checkpoint that a run begins with.

    Args:
        checkpoint: Path or address.

    Raises:
        UserError: it cannot be read.
    """
    path = resolve_checkpoint(checkpoint)
    return Start(path, read_checkpoint(path, history=HistoryBuffer))


def adapt(start: Start, meta_model: nn.Module, other_classes: bool = False) -> None:
    """Make sure that a checkpoint fits a network, and put its weights under the network's names; in place.

    Args:
        start: The checkpoint.
        meta_model: The network, on any device.
        other_classes: Whether it may be for another number of classes.

    Raises:
        UserError: it does not fit, or the network would not notice.
    """
    start.other_classes = other_classes
    weights = check_fit(meta_model, start.path, start.content, other_classes)
    before = start.content.get('state_dict')
    if not other_classes and (before is None or weights.keys() != before.keys()):
        start.notes.append(f'Weights in another form: {len(weights)} tensors converted in memory.')
    start.content = {**(start.content if before is not None else {}), 'state_dict': weights}


def check_fit(meta_model: nn.Module, path: object, content: dict, other_classes: bool = False) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the names of a network that they fit.

    Args:
        meta_model: The network.
        path: Of the checkpoint, for the message.
        content: What it holds.
        other_classes: Whether it may be for another number of classes.

    Raises:
        UserError: it does not fit, or the network would not notice.
    """
    if not isinstance(meta_model, DeployableModel):
        raise UserError(
            f'model.type is {type(meta_model).__name__}, which would load weights that do not fit and only log it. '
            'Use FastEncoderDecoder, which refuses them and gives the same label maps, or RecNeXtClassifier.'
        )
    try:
        return meta_model.adapt_state_dict(content, other_classes)
    except ConversionError as error:
        raise ConversionError(f'{path}: {error}') from None


def _read_backbone(meta_model: nn.Module) -> Conversion | None:
    """Read the weights that a backbone of ours starts from; None if there are none, or more than one file."""
    if not isinstance(meta_model.backbone, StrictlyPretrained):
        return None
    read = [read_pretrained(meta_model.backbone, file)[1] for file in pretrained_files(meta_model.backbone.init_cfg)]
    return read[0] if len(read) == 1 else None
