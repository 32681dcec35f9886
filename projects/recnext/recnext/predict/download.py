"""Released checkpoints, fetched, checked and ready to use."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..checkpoints.digests import check_digest, sha256_of_weights, weights_of, write_digests
from ..checkpoints.fetch import NotThereError, TransferError, fetch
from ..checkpoints.files import read_checkpoint
from ..checkpoints.releases import find_released_config, get_release, read_releases
from ..openmmlab.builder import build_on_meta, released_model_cfg
from ..openmmlab.convert import convert_file
from ..openmmlab.pretrained import read_pretrained
from ..utils.errors import UserError
from ..utils.files import make_folder, sha256_of
from ..utils.paths import CHECKPOINTS, CONFIGS, command


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
    segmentor = release['task'] == 'segmentation'

    def finish(arrived: Path, place: Path) -> None:
        check_digest(name, sha256_of(arrived), folder)
        if segmentor:
            convert_file(arrived, place, config=str(CONFIGS / release['config']))
        else:
            read_pretrained(build_on_meta(released_model_cfg(release['arch'])).backbone, str(arrived))
            os.replace(arrived, place)

    found = place.is_file()
    if not found:
        try:
            fetch_first(addresses(release, base_url), place, finish)
        except TransferError as error:
            mirror = command('download', name, '--base-url', 'URL')
            hint = '' if base_url else f'\n  From a mirror, or a folder with the released files: {mirror}'
            raise UserError(f'{error}{hint}') from None
    content = read_checkpoint(place)
    digest = released_digest(place, content)
    try:
        recorded = check_digest(name, digest, folder)
    except UserError as error:
        raise UserError(f'{place} is there already. {error}\n  To download it again, remove it.') from None
    if not found:
        weights = {weights_of(name): sha256_of_weights(content['state_dict'])} if segmentor else {}
        write_digests(folder, {name: digest, **weights})
    return (
        f'{place}, {place.stat().st_size / 1e6:.1f} MB, {"was there already" if found else "downloaded"}; '
        f'sha256 as released: {digest}{" (nothing to compare it with)" if found and not recorded else ""}'
    )


def find_released_weights(name: str) -> Path:
    """The weights of a released segmentor in mmseg 1.x form, downloaded first if they are not in ``checkpoints/``.

    Raises:
        UserError: ``name`` is no released segmentor; or its weights cannot be had.
    """
    if find_released_config(name) is None:
        raise UserError(f'{name} is not the name of a released segmentor; expected weights for it, CONFIG CHECKPOINT.')
    place = CHECKPOINTS / f'{name}.pth'
    if not place.is_file():
        print(download_release(get_release(name), CHECKPOINTS), flush=True)
    return place


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
    """:func:`fetch.fetch` from the first address that has the file."""
    for url in urls[:-1]:
        try:
            return fetch(url, place, finish)
        except NotThereError:
            continue
    fetch(urls[-1], place, finish)


def released_digest(path: Path, content: dict) -> str:
    """SHA-256 of the released file that this one is, or says that it was converted from."""
    meta = content.get('meta')
    source = meta.get('source') if isinstance(meta, dict) else None
    return source['sha256'] if isinstance(source, dict) and 'sha256' in source else sha256_of(path)
