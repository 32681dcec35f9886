"""Putting a model on the Hugging Face hub: its folder, and a card with its provenance."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.download import find_recorded_release, sha256_of_weights
from ..checkpoints.folder import DESCRIPTION, read_description
from ..checkpoints.hub import parse_repository, push_folder
from ..utils.errors import UserError
from ..utils.evaluation import RECORD, read_evaluation
from ..utils.files import sha256_of
from ..utils.paths import CHECKPOINTS, command
from .model_card import write_card

if TYPE_CHECKING:
    from .model import Model


def push_model(
    model: 'Model', repository: str, license: str = 'apache-2.0', private: bool = False, metrics: dict | None = None
) -> str:
    """Put a model on the hub, in one commit.

    Args:
        model: As trained: nothing fused or converted.
        repository: ``'user/name'``, which is created if it is not there.
        license: Of the weights, as the hub spells it.
        private: Whether a new repository is for its owner alone.
        metrics: Measured figures (:func:`read_figures`); None means those published, of a released file.

    Returns:
        The address of the commit.

    Raises:
        UserError: the model has no such form, or the hub refuses. Nothing stays here.
    """
    place = parse_repository(repository)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        description = read_description(Path(folder, DESCRIPTION))
        weights = sha256_of_weights(model.network.state_dict())
        release = find_recorded_release(CHECKPOINTS, description.provenance.get('file_sha256', ''), weights)
        description = dataclasses.replace(
            description,
            provenance={**description.provenance, **(dict(release=release['name']) if release else {})},
            metrics=metrics or (release['metrics'] if release else {}),
        )
        description.write(Path(folder, DESCRIPTION))
        write_card(Path(folder, 'README.md'), description, place.name, license, measured=bool(metrics))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        print(f'{place}: uploading {size / 1e6:.1f} MB', flush=True)
        return push_folder(Path(folder), place, private)


def read_figures(work_dir: Path, sha256: str) -> dict[str, float]:
    """Return the figures of the newest test of a checkpoint, as ``recnext test`` left them in a work dir.

    Raises:
        UserError: there is none, or it is of other weights.
    """
    records = sorted(work_dir.rglob(RECORD), key=os.path.getmtime)
    advice = f'Test it first: {command("test", "CONFIG", "CHECKPOINT", "--work-dir", str(work_dir))}'
    if not records:
        raise UserError(f'No {RECORD} in {work_dir}. {advice}')
    evaluation = read_evaluation(records[-1])
    tested = Path(evaluation.of.removeprefix('test of '))
    if not tested.is_file() or sha256_of(tested) != sha256:
        raise UserError(f'{records[-1]} is of another checkpoint: {evaluation.of}. {advice}')
    if os.path.getmtime(tested) > os.path.getmtime(records[-1]):
        raise UserError(f'{tested} was written after {records[-1]}. {advice}')
    return dict(evaluation.means, images=evaluation.images)
