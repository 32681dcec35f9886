"""The list of released checkpoints, ``released.json``."""

import difflib
import json
import os
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit
from urllib.request import url2pathname

from ..utils.errors import UserError
from ..utils.paths import CHECKPOINTS, CONFIGS, RELEASED, command, find_path
from .files import CheckpointError


def read_releases() -> list[dict]:
    """Return one dict per released file.

    ``name``, ``task``, ``arch``, ``url``, ``metrics``; of segmentors also ``config``, ``backbone_latency_ms`` and
    ``parameters_million``; ``hub`` where the Hugging Face hub has the same weights.
    """
    return json.loads(RELEASED.read_text())['files']


def read_sources() -> dict[str, str]:
    """Return the source of each kind of figure in the list."""
    return json.loads(RELEASED.read_text())['sources']


def list_models() -> list[str]:
    """Return the names of the released segmentors, such as ``recnext_m3_ade20k``."""
    return [release['name'] for release in read_releases() if release['task'] == 'segmentation']


def find_release(path: str) -> dict | None:
    """Return the release whose file is called as ``path`` is, if there is one."""
    name = PurePosixPath(path).name
    return next((release for release in read_releases() if PurePosixPath(release['url']).name == name), None)


def find_released_config(name: str) -> Path | None:
    """Return the config of the released segmentor of this name, such as ``recnext_m3_ade20k``, if there is one."""
    configs = (release['config'] for release in read_releases() if release['name'] == name and 'config' in release)
    return next((CONFIGS / config for config in configs), None)


def get_release(name: str) -> dict:
    """Return the release of that name.

    Raises:
        UserError: there is none, with the names that come close.
    """
    releases = {release['name']: release for release in read_releases()}
    if name not in releases:
        close = [known for known in releases if name.lower() in known] or difflib.get_close_matches(name, releases, 5)
        meant = f'Did you mean {", ".join(close)}?' if close else f'There are {", ".join(releases)}.'
        raise UserError(f'No released checkpoint is called {name}. {meant}')
    return releases[name]


def resolve_checkpoint(checkpoint: str) -> Path:
    """Return the file of a checkpoint that a user names.

    Args:
        checkpoint: An address, which is fetched; or a path, from ``~``, the working directory or else the project.

    Raises:
        UserError: it is not there, with the command that fetches it if it is a released one; or it cannot be had.
    """
    if checkpoint.startswith('file://'):
        path = find_path(url2pathname(urlsplit(checkpoint).path))
    elif '://' in checkpoint:
        from .fetch import fetch_checkpoint

        return fetch_checkpoint(checkpoint)
    else:
        path = find_path(os.path.expanduser(checkpoint))
    if path is None:
        raise CheckpointError(f'No such checkpoint: {checkpoint}{_how_to_get(checkpoint)}')
    return path


def _how_to_get(checkpoint: str) -> str:
    release = find_release(checkpoint)
    if release is None:
        return ''
    parent = Path(checkpoint).parent
    folder = [] if str(parent) == CHECKPOINTS.name else ['--dir', str(parent)]
    return f'\n  Get it: {command("download", release["name"], *folder)}\n  (from {release["url"]})'
