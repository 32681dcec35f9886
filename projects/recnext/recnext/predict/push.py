"""Putting a trained segmentor on the Hugging Face hub: weights, config, classes, and a card with its provenance."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ..checkpoints.download import find_recorded_release, sha256_of_weights
from ..checkpoints.files import write_safetensors
from ..checkpoints.hub import DESCRIPTION, WEIGHTS, parse_repository, push_folder
from ..openmmlab.config import name_of
from ..openmmlab.loading import TrainedSegmentor, load_segmentor
from ..openmmlab.record import RECORD, read_evaluation
from ..openmmlab.stored_config import encode_config
from ..utils.errors import UserError
from ..utils.files import sha256_of
from ..utils.paths import command
from .model_card import write_card
from .predictor import classes_of

CONFIG = 'config.py'
"""For people to read: this project never runs the one of a repository."""


def push(
    config: str,
    checkpoint: str,
    repository: str,
    metrics: str | None = None,
    license: str = 'apache-2.0',
    private: bool = False,
) -> str:
    """Put a segmentor on the hub, in one commit; see ``recnext push --help``.

    Args:
        config: Path of the config, or the name of a release.
        checkpoint: Path or address of the weights, of mmseg 1.x or 0.x.
        repository: ``'user/name'``, which is created if it is not there.
        metrics: Work dir of a test of this checkpoint, whose figures go on the card.
        license: Of the weights, as the hub spells it.
        private: Whether a new repository is for its owner alone.

    Returns:
        A line that says what is there now.

    Raises:
        UserError: config and checkpoint do not fit, the figures are of others, or the hub refuses. Nothing stays here.
    """
    place = parse_repository(repository)
    trained = load_segmentor(config, checkpoint)
    measured = read_figures(Path(metrics), trained.checkpoint) if metrics else None
    with tempfile.TemporaryDirectory() as folder:
        description = write_segmentor(Path(folder), trained, name_of(config, trained.cfg), measured)
        load_segmentor(folder, str(Path(folder, WEIGHTS)))  # nothing is pushed that would be refused when it is pulled
        write_card(Path(folder, 'README.md'), description, place.name, license)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f'{place}: uploading {size / 1e6:.1f} MB', flush=True)
        address = push_folder(Path(folder), place, private)
    return f'{address}\nTry it: {command("predict", str(place), "photo.jpg")}'


def write_segmentor(folder: Path, trained: TrainedSegmentor, name: str, measured: Mapping | None = None) -> dict:
    """Write a segmentor's weights, its description and its config, as :func:`find.find_trained` takes them.

    Args:
        folder: Where.
        trained: The segmentor.
        name: Of its config.
        measured: What :func:`read_figures` gives.

    Returns:
        The description.

    Raises:
        UserError: the config is no plain data, or the classes are not those of the head.
    """
    cfg, file, content, network = trained
    weights, sha256 = network.state_dict(), sha256_of(file)
    sha256_of_tensors = sha256_of_weights(weights)
    release = find_recorded_release(Path(file).parent, sha256, sha256_of_tensors)
    classes, palette = classes_of(cfg, content, network.num_classes)
    encoded = encode_config(cfg)
    source = dict(file=Path(file).name, sha256=sha256, release=release and release['name'])
    write_safetensors(weights, folder / WEIGHTS, source)
    description = dict(
        name=re.sub(r'[^\w-]+', '-', name),
        architecture=cfg.model.type,
        backbone={key: cfg.model.backbone[key] for key in ('type', 'arch') if key in cfg.model.backbone},
        classes=classes,
        palette=palette.tolist(),
        source=source,
        weights=dict(file=WEIGHTS, sha256=sha256_of(folder / WEIGHTS), sha256_of_tensors=sha256_of_tensors),
        published=release and release['metrics'],
        measured=measured,
        config=encoded,
    )
    (folder / DESCRIPTION).write_text(f'{json.dumps(description, indent=1)}\n')
    note = f'# For people to read, and for mmseg. recnext reads {DESCRIPTION}, and never runs this file.'
    (folder / CONFIG).write_text(f'{note}\n{cfg.pretty_text}')
    return description


def read_figures(work_dir: Path, checkpoint: str) -> dict:
    """The figures of the newest test of a checkpoint, as ``recnext test`` left them in a work dir.

    Raises:
        UserError: there is none, it is of other weights, or these have changed since.
    """
    records = sorted(work_dir.rglob(RECORD), key=os.path.getmtime)
    advice = f'Test it first: {command("test", "CONFIG", checkpoint, "--work-dir", str(work_dir))}'
    if not records:
        raise UserError(f'No {RECORD} in {work_dir}. {advice}')
    evaluation = read_evaluation(records[-1])
    tested = evaluation.of.removeprefix('test of ')
    if not os.path.exists(tested) or not os.path.samefile(tested, checkpoint):
        raise UserError(f'{records[-1]} is of another checkpoint: {evaluation.of}; found {checkpoint}. {advice}')
    if os.path.getmtime(checkpoint) > os.path.getmtime(records[-1]):
        raise UserError(f'{checkpoint} was written after {records[-1]}. {advice}')
    return dict(evaluation.means, images=evaluation.images)
