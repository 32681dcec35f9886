"""SHA-256 of released files and of the weights in them, as recorded when they were first downloaded.

They alone tell whether a file is a release. Its name does not, and neither does what it says of itself: whoever trains
on can keep both. A file that was converted, renamed or saved anew holds other bytes but the same weights, and these
have a SHA-256 of their own.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch

from ..utils.errors import UserError
from ..utils.files import atomic_write
from ..utils.paths import CHECKPOINTS
from .releases import read_releases

DIGESTS = 'sha256.json'
"""Beside the checkpoints: the SHA-256 of each release by name, and that of a segmentor's weights by `weights_of`."""


def weights_of(name: str) -> str:
    """Under which name the weights of a release are recorded."""
    return f'{name} (weights)'


def sha256_of_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in 64 hexadecimal digits; in whatever order they come."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def find_recorded_release(folder: Path, file: str, weights: str) -> dict | None:
    """The release that a file holds, as far as this project or its folder has a record of it.

    Args:
        folder: Of the file.
        file: Its SHA-256.
        weights: That of its weights, under the names that they have in mmseg 1.x.

    Raises:
        UserError: a record is damaged.
    """
    # The project's own record counts before any other.
    records = read_digests(CHECKPOINTS), read_digests(folder)
    for release in read_releases():
        name = release['name']
        known = next((record for record in records if name in record), {})
        if file == known.get(name) or weights == known.get(weights_of(name)):
            return release
    return None


def check_digest(name: str, digest: str, folder: Path) -> bool:
    """Compare a file with the one that was downloaded first, as recorded in its folder or in this project.

    Returns:
        Whether there is a record.

    Raises:
        UserError: the two digests differ.
    """
    for record in (folder, CHECKPOINTS):
        known = read_digests(record).get(name)
        if known == digest:
            return True
        if known:
            raise UserError(
                f'{name}: found sha256 {digest},\n  expected {known} as recorded in {record / DIGESTS}.\n'
                '  One of the two is not the released file. If it is the first, remove it from the record.'
            )
    return False


def read_digests(folder: Path) -> dict[str, str]:
    """SHA-256 by name, as recorded in a folder.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / DIGESTS
    try:
        digests = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f'{path} is no JSON: {error}. Restore it, or remove it to begin anew.') from None
    if not isinstance(digests, dict):
        raise UserError(
            f'{path} holds a {type(digests).__name__}; expected SHA-256 by name. '
            'Restore it, or remove it to begin anew.'
        )
    return digests


def write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Add to the record of a folder."""
    text = json.dumps({**read_digests(folder), **digests}, indent=2, sort_keys=True)
    with atomic_write(folder / DIGESTS) as beside:
        beside.write_text(f'{text}\n')
