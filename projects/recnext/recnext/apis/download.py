"""Released checkpoints, fetched, checked and ready to use."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..models.builder import build_skeleton, released_model_cfg
from ..models.pretrained import read_pretrained
from ..utils.errors import UserError
from ..utils.files import make_folder, sha256_of, written_beside
from ..utils.paths import CHECKPOINTS, CONFIGS
from ..weights.checkpoint import read_checkpoint
from ..weights.fetch import NotThereError, TransferError, fetch
from ..weights.releases import get_release, read_releases
from .convert import convert_file

DIGESTS = 'sha256.json'
"""Beside the checkpoints: SHA-256 of each released file, by name, as it was when it was first downloaded."""


def download_checkpoints(
    names: Sequence[str] = (), every: bool = False, folder: str | Path | None = None, base_url: str | None = None
) -> Iterator[str]:
    """Download released checkpoints, one after the other.

    Args:
        names: Of the releases.
        every: All of them, whatever ``names`` says.
        folder: Where they go; ``checkpoints/`` of this project if None.
        base_url: See :func:`addresses`.

    Yields:
        What was done, for each.

    Raises:
        UserError: an unknown name, before anything is downloaded; or what went wrong, after all were tried.
    """
    releases = read_releases() if every else [get_release(name) for name in names]
    folder = Path(folder or CHECKPOINTS)
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

    Returns:
        A line that says what is there now, and its SHA-256 as released.

    Raises:
        UserError: it cannot be had, is not what it should be, or not what was downloaded before under this name.
    """
    name, place = release['name'], folder / f'{release["name"]}.pth'

    def finish(arrived: Path, place: Path) -> None:
        check_digest(name, sha256_of(arrived), folder)
        if release['task'] == 'segmentation':
            convert_file(arrived, place, config=str(CONFIGS / release['config']))
        else:
            read_pretrained(build_skeleton(released_model_cfg(release['arch'])).backbone, str(arrived))
            os.replace(arrived, place)

    found = place.is_file()
    if not found:
        try:
            fetch_first(addresses(release, base_url), place, finish)
        except TransferError as error:
            hint = '' if base_url else '\n  A mirror, or a folder with the released files, is named with --base-url.'
            raise UserError(f'{error}{hint}') from None
    digest = released_digest(place)
    try:
        recorded = check_digest(name, digest, folder)
    except UserError as error:
        raise UserError(f'{place} is there already. {error}\n  To download it again, remove it.') from None
    if not found and not recorded:
        write_digest(folder, name, digest)
    return (
        f'{place}, {place.stat().st_size / 1e6:.1f} MB, {"was there already" if found else "downloaded"}; '
        f'sha256 as released: {digest}{" (nothing to compare it with)" if found and not recorded else ""}'
    )


def addresses(release: dict, base_url: str | None = None) -> list[str]:
    """Where a released file may be.

    Args:
        release: One of the list.
        base_url: Address or folder in the place of ``https://github.com/suous/RecNeXt/releases/download``. The files
            are in it as there, in ``v1.0/`` and ``v2.0/``, or directly.

    Raises:
        UserError: no such folder.
    """
    if base_url is None:
        return [release['url']]
    if '://' not in base_url:
        if not Path(base_url).is_dir():
            raise UserError(f'--base-url takes an http(s) address or a folder; there is no folder {base_url}')
        base_url = Path(base_url).resolve().as_uri()
    *_, version, file = release['url'].split('/')
    return [f'{base_url.rstrip("/")}/{version}/{file}', f'{base_url.rstrip("/")}/{file}']


def fetch_first(urls: Sequence[str], place: Path, finish: Callable[[Path, Path], object]) -> None:
    """:func:`transfer.fetch` from the first address that has the file."""
    for url in urls[:-1]:
        try:
            return fetch(url, place, finish)
        except NotThereError:
            continue
    fetch(urls[-1], place, finish)


def released_digest(path: Path) -> str:
    """SHA-256 of the released file that this one is, or was converted from."""
    meta = read_checkpoint(path).get('meta')
    source = meta.get('source') if isinstance(meta, dict) else None
    return source['sha256'] if isinstance(source, dict) and 'sha256' in source else sha256_of(path)


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
    """Name of a release -> SHA-256 of its file, as recorded in a folder.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / DIGESTS
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f'{path} is no JSON: {error}. Restore it, or remove it to begin anew.') from None


def write_digest(folder: Path, name: str, digest: str) -> None:
    """Add a digest to the record of a folder."""
    text = json.dumps({**read_digests(folder), name: digest}, indent=2, sort_keys=True)
    with written_beside(folder / DIGESTS) as beside:
        beside.write_text(f'{text}\n')
