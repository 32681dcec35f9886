"""What a run needs, looked for before anything is built or written: data, weights to start from, checkpoints.

The network that the checks compare with has no values (:func:`builder.build_on_meta`). Building it takes up to
seconds, so a run builds it once and hands it to each check.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from torch import nn

from ..checkpoints.files import CheckpointError, read_checkpoint, read_newest_checkpoint
from ..checkpoints.keys import ConversionError
from ..checkpoints.releases import resolve_checkpoint
from ..utils.errors import UserError
from .builder import build_on_meta, drop_pretrained
from .config import is_segmentor, point_at_data
from .deployable import DeployableModel
from .listing import check_before_run, leaves
from .pretrained import StrictlyPretrained, pretrained_files, read_pretrained, read_to_check

TRAINING_STATE = ('optimizer', 'message_hub')
"""What a checkpoint holds beside the weights if training can go on from it."""


@dataclass
class Start:
    """The checkpoint that a run begins with, as the checks have read it."""

    path: str
    content: dict | None
    damaged: list[CheckpointError] = field(default_factory=list)
    """What is wrong with the newer ones in the work dir."""

    def pop(self) -> dict:
        """Return the content and release this reference to it: it may be larger than the network."""
        content, self.content = self.content, None
        return content


def set_data_root(
    cfg: Config, data_root: str | None, splits: Iterable[str], meta_model: nn.Module | None = None
) -> None:
    """Point the datasets of ``splits`` at ``data_root``, or at where the config's own is found, and check them.

    Args:
        cfg: Of the run; changed in place.
        data_root: Folder of the dataset; None means the config's.
        splits: Such as ``'train'``.
        meta_model: The network of ``cfg``; None means that it is yet to be built.

    Raises:
        UserError: there are no images, images without an annotation, or annotations for other classes.
    """
    num_classes = (meta_model or build_on_meta(cfg.model)).num_classes
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in leaves(loader.dataset) if loader else ():
            point_at_data(dataset, data_root)
            check_before_run(dataset, split, num_classes, is_segmentor(cfg))


def choose_weights(cfg: Config, resume: str | None, meta_model: nn.Module | None = None) -> Start | None:
    """Decide what training starts from, and make sure that it is there and fits.

    Args:
        cfg: Of the run; changed in place.
        resume: See :func:`train`; the config's own ``resume`` counts where it is None.
        meta_model: The network of ``cfg``; None means that it is yet to be built.

    Returns:
        The checkpoint that training goes on from; None at a fresh start.

    Raises:
        UserError: a file is missing, does not fit, or holds no training state to go on from.
    """
    meta_model = meta_model or build_on_meta(cfg.model)
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    if resume == 'auto':
        # None where there is nothing to resume yet: a fresh start.
        newest = read_newest_checkpoint(cfg.work_dir, HistoryBuffer)
        start = newest and Start(str(newest.path), newest.content, newest.damaged)
    else:
        start = _read(resume) if resume else None
    cfg.resume = start is not None
    if start:
        check_fit(meta_model, start.path, start.content)
        missing = [key for key in TRAINING_STATE if key not in start.content]
        if missing:
            raise UserError(
                f'{start.path} holds weights, but no {" and no ".join(missing)} to go on from.\n'
                f'  To start a new run from these weights: --cfg-options load_from={start.path}'
            )
        drop_pretrained(cfg.model)  # all weights come from the checkpoint
        cfg.load_from = start.path
    elif cfg.get('load_from'):
        path = resolve_checkpoint(cfg.load_from)
        check_fit(meta_model, str(path), read_to_check(path), other_classes=True)
        drop_pretrained(cfg.model)
        # The segmentor loads them itself, with another classifier if need be.
        cfg.model.init_cfg, cfg.load_from = dict(type='Pretrained', checkpoint=str(path)), None
    else:
        check_pretrained(meta_model)
    return start


def _read(checkpoint: str) -> Start:
    path = resolve_checkpoint(checkpoint)
    return Start(str(path), read_checkpoint(path, history=HistoryBuffer))


def check_pretrained(meta_model: nn.Module) -> None:
    """Make sure that the weights to start from are there and fit; those of another backbone are mmengine's to load.

    Raises:
        UserError: no such file, or one that does not fit.
    """
    backbone = meta_model.backbone
    if isinstance(backbone, StrictlyPretrained):
        for checkpoint in pretrained_files(backbone.init_cfg):
            read_pretrained(backbone, checkpoint, read_to_check)


def check_checkpoint(cfg: Config, checkpoint: str, meta_model: nn.Module | None = None) -> dict:
    """Make sure that a checkpoint fits the network of a config, before anything is built or written.

    Args:
        cfg: Of the network.
        checkpoint: Path or address.
        meta_model: The network of ``cfg``; None means that it is yet to be built.

    Returns:
        What the file holds.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    content = read_checkpoint(resolve_checkpoint(checkpoint))
    check_fit(meta_model or build_on_meta(cfg.model), checkpoint, content)
    return content


def check_fit(meta_model: nn.Module, path: str, content: dict, other_classes: bool = False) -> None:
    """Make sure that the content of a checkpoint fits a network.

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
        meta_model.adapt_state_dict(content, other_classes)
    except ConversionError as error:
        raise ConversionError(f'{path}: {error}') from None
