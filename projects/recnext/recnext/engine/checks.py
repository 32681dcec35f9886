"""What a run needs, looked for before anything is built or written: data, weights to start from, checkpoints."""

from collections.abc import Iterable

from mmengine.config import Config

from ..datasets.listing import check_before_run, leaves
from ..models.builder import build_skeleton
from ..models.deployable_model import DeployableModel
from ..models.pretrained import pretrained_files, read_pretrained
from ..models.state_dict import ConversionError
from ..utils.errors import UserError
from ..weights.checkpoint import find_newest_checkpoint, read_checkpoint
from ..weights.releases import find_checkpoint
from .config import is_segmentor, point_at_data

TRAINING_STATE = ('optimizer', 'message_hub')
"""What a checkpoint holds beside the weights if training can go on from it."""


def choose_weights(cfg: Config, resume: str | None) -> None:
    """Decide what training starts from, and make sure that it is there and fits.

    Args:
        cfg: Of the run; changed in place.
        resume: See :func:`train`; the config's own ``resume`` counts where it is None.

    Raises:
        UserError: a file is missing, does not fit, or holds no training state to go on from.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    if resume == 'auto':
        # None where there is nothing to resume yet: a fresh start.
        resume = find_newest_checkpoint(cfg.work_dir)
    cfg.resume = resume is not None
    if cfg.resume:
        cfg.load_from = resume
    if not cfg.get('load_from'):
        check_pretrained(cfg)
        return
    cfg.load_from = str(find_checkpoint(cfg.load_from))
    checkpoint = check_checkpoint(cfg, cfg.load_from, other_classes=not cfg.resume)
    missing = [key for key in TRAINING_STATE if key not in checkpoint]
    if cfg.resume and missing:
        raise UserError(
            f'{cfg.load_from} holds weights, but no {" and no ".join(missing)} to go on from.\n'
            f'  To start a new run from these weights: --cfg-options load_from={cfg.load_from}'
        )
    # All weights come from there: no need for the ImageNet file.
    cfg.model.backbone.init_cfg = None
    if not cfg.resume:
        # The segmentor loads them itself, with another classifier if need be.
        cfg.model.init_cfg, cfg.load_from = dict(type='Pretrained', checkpoint=cfg.load_from), None


def set_data_root(cfg: Config, data_root: str | None, splits: Iterable[str]) -> None:
    """Point the datasets of ``splits`` at ``data_root``, or at where the config's own is found, and check them.

    Raises:
        UserError: there are no images, images without an annotation, or annotations for other classes.
    """
    num_classes = build_skeleton(cfg.model).num_classes
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for dataset in leaves(loader.dataset) if loader else ():
            point_at_data(dataset, data_root)
            check_before_run(dataset, split, num_classes, is_segmentor(cfg))


def check_pretrained(cfg: Config) -> None:
    """Make sure that the weights to start from are there and fit, before anything is built or written.

    Raises:
        UserError: no such file, or one that does not fit.
    """
    backbone = build_skeleton(cfg.model).backbone
    for checkpoint in pretrained_files(backbone.init_cfg):
        read_pretrained(backbone, checkpoint)


def check_checkpoint(cfg: Config, checkpoint: str, other_classes: bool = False) -> dict:
    """Make sure that a checkpoint fits the network of a config, before anything is built or written.

    Args:
        cfg: Of the network.
        checkpoint: Path or address.
        other_classes: Whether it may be for another number of classes.

    Returns:
        What the file holds.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    content = read_checkpoint(find_checkpoint(checkpoint))
    model = build_skeleton(cfg.model)
    if not isinstance(model, DeployableModel):
        raise UserError(
            f'model.type is {type(model).__name__}, which would load weights that do not fit and only log it. '
            'Use FastEncoderDecoder, which refuses them and gives the same label maps, or RecNeXtClassifier.'
        )
    try:
        model.fit(content, other_classes)
    except ConversionError as error:
        raise ConversionError(f'{checkpoint}: {error}') from None
    return content
