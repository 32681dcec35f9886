"""Released checkpoints, downloaded, checked and ready to use, and the SHA-256 recorded of each.

The SHA-256 alone tells whether a file is a release. Its name does not, and neither does what it says of itself:
whoever trains on can keep both. A file that was converted, renamed or saved anew holds other bytes but the same
weights, and these have a SHA-256 of their own.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ..utils.errors import UserError
from ..utils.files import atomic_write, make_folder, sha256_of
from ..utils.paths import CHECKPOINTS, command
from .convert import convert_file, released_tensors
from .fetch import NotThereError, TransferError, called, fetch, locked
from .files import read_checkpoint
from .keys import check_weights_fit, convert_state_dict, get_state_dict, select_backbone
from .releases import find_released_config, get_release, read_releases

DIGESTS = 'sha256.json'
"""Beside the checkpoints: the SHA-256 of each release by name, and that of a segmentor's weights by `weights_of`."""


def download_checkpoints(
    names: Sequence[str] = (), every: bool = False, folder: str | Path | None = None, base_url: str | None = None
) -> Iterator[str]:
    """Download released checkpoints, one after the other.

    Args:
        names: Of the releases.
        every: All of them, whatever ``names`` says.
        folder: Where they go; ``checkpoints/`` of this project if None.
        base_url: Address or folder in the place of ``https://github.com/suous/RecNeXt/releases/download``. The files
            are in it as there, in ``v1.0/`` and ``v2.0/``, or directly.

    Yields:
        What was done, for each.

    Raises:
        UserError: an unknown name, before anything is downloaded; or what went wrong, after all were tried.
    """
    releases = read_releases() if every else [get_release(name) for name in names]
    folder = Path(os.path.expanduser(folder or CHECKPOINTS))
    make_folder(folder)
    failed = []
    for release in releases:
        try:
            yield download_release(release, folder, base_url)
        except UserError as error:
            failed.append(str(error))
    if failed:
        tally = f'{len(failed)} of {len(releases)} checkpoints failed.\n' if len(releases) > 1 else ''
        raise UserError(tally + '\n'.join(failed))


def download_release(release: dict, folder: Path, base_url: str | None = None) -> str:
    """Make ``folder / NAME.pth`` of a released file, unless it is there: a segmentor in mmseg 1.x form, the rest as is.

    Args:
        release: One of the list.
        folder: Where.
        base_url: See :func:`download_checkpoints`.

    Returns:
        A line that says what is there now, the SHA-256 of the released file, and what that was compared with.

    Raises:
        UserError: it cannot be had, is not what it should be, or not what was downloaded before under this name.
    """
    path = folder / f'{release["name"]}.pth'
    with locked(path) as staging:
        found = path.is_file()
        digest, recorded = (_check_again if found else _download)(release, path, staging, base_url)
    if recorded:
        compared = 'equal to the one recorded at the first download'
    else:
        compared = (
            'not on record, so compared with nothing' if found else 'recorded now; there was none to compare with'
        )
    return (
        f'{path}, {path.stat().st_size / 1e6:.1f} MB, {"was there already" if found else "downloaded"}; '
        f'sha256 of the released file: {digest}, {compared}'
    )


def _check_again(release: dict, path: Path, *_: object) -> tuple[str, bool]:
    """Return the SHA-256 of the released file that this one is, or says that it was converted from; and if known."""
    meta = read_checkpoint(path).get('meta')
    source = meta.get('source') if isinstance(meta, dict) else None
    digest = source['sha256'] if isinstance(source, dict) and 'sha256' in source else sha256_of(path)
    try:
        return digest, check_digest(release['name'], digest, path.parent)
    except UserError as error:
        raise UserError(f'{path} is there already. {error}\n  To download it again, remove it.') from None


def _download(release: dict, path: Path, staging: Path, base_url: str | None) -> tuple[str, bool]:
    """Return the SHA-256 of the released file, and whether it was on record."""
    name = release['name']
    with atomic_write(path, staging) as partial:
        # Under its own name: a converted file says what it was made of.
        arrived = partial.parent / 'released' / path.name
        arrived.parent.mkdir()
        source, url = _get_released(release, arrived, base_url)
        with called(arrived, url):
            digest = sha256_of(source)
            recorded = check_digest(name, digest, path.parent)
            digests = {name: digest}
            if release['task'] == 'segmentation':
                expected = released_tensors('segmentor', release['arch'])
                converted = convert_file(source, partial, expected=expected, sha256=digest).conversion
                digests[weights_of(name)] = sha256_of_weights(converted.state_dict)
            else:
                converted = select_backbone(convert_state_dict(get_state_dict(read_checkpoint(source))))
                expected = released_tensors('backbone', release['arch'])
                check_weights_fit(converted.state_dict, expected, f'the backbone of {name}')
                shutil.copyfile(source, partial)
    write_digests(path.parent, digests)
    return digest, recorded


def _get_released(release: dict, path: Path, base_url: str | None) -> tuple[Path, str]:
    """Return a released file, in the folder that it is taken from or fetched to ``path``, and its address."""
    *_, version, file = release['url'].split('/')
    if base_url is None:
        mirror = command('download', release['name'], '--base-url', 'URL')
        try:
            fetch(release['url'], path)
        except TransferError as error:
            hint = f'From a mirror, or a folder with the released files: {mirror}'
            raise type(error)(f'{error}\n  {hint}') from None
        return path, release['url']
    if '://' not in base_url:
        folder = Path(os.path.expanduser(base_url))
        if not folder.is_dir():
            raise UserError(f'--base-url takes an http(s) address or a folder; there is no folder {folder}')
        found = next((known for known in (folder / version / file, folder / file) if known.is_file()), None)
        if found is None:
            raise NotThereError(f'{folder} holds neither {version}/{file} nor {file}.')
        return found, str(found)
    url = base_url.rstrip('/')
    try:
        fetch(f'{url}/{version}/{file}', path)
        return path, f'{url}/{version}/{file}'
    except NotThereError:
        fetch(f'{url}/{file}', path)
        return path, f'{url}/{file}'


def find_released_weights(name: str) -> Path:
    """Return the weights of a released segmentor in mmseg 1.x form, downloaded first if they are not there.

    Raises:
        UserError: ``name`` is no released segmentor; or its weights cannot be had.
    """
    if find_released_config(name) is None:
        raise UserError(f'{name} is not the name of a released segmentor; expected weights for it, CONFIG CHECKPOINT.')
    path = CHECKPOINTS / f'{name}.pth'
    if not path.is_file():
        print(download_release(get_release(name), CHECKPOINTS), flush=True)
    return path


def weights_of(name: str) -> str:
    """Return the name under which the weights of a release are recorded."""
    return f'{name} (weights)'


def sha256_of_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and values, in 64 hexadecimal digits; in whatever order they come."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def find_recorded_release(folder: Path, file: str, weights: str) -> dict | None:
    """Return the release that a file holds, as far as this project or its folder has a record of it.

    Args:
        folder: Of the file.
        file: Its SHA-256.
        weights: That of its weights, under the names that they have in mmseg 1.x.

    Raises:
        UserError: a record is damaged.
    """
    theirs, ours = read_digests(folder), read_digests(CHECKPOINTS)
    for release in read_releases():
        name = release['name']
        record = ours if name in ours else theirs  # the project's own record counts before any other
        if file == record.get(name) or weights == record.get(weights_of(name)):
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
    """Return SHA-256 by name, as recorded in a folder.

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
    """Add to the record of a folder, one process at a time."""
    path = folder / DIGESTS
    with locked(path) as staging, atomic_write(path, staging) as partial:
        partial.write_text(f'{json.dumps({**read_digests(folder), **digests}, indent=2, sort_keys=True)}\n')
