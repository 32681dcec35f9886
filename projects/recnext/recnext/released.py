"""The list of released checkpoints, ``checkpoints/released.json``."""

import json
from pathlib import Path, PurePosixPath

from .paths import CONFIGS, RELEASED


def read_releases() -> list[dict]:
    """One dict a file: ``name``, ``task``, ``arch``, ``url``, ``metrics`` and, for segmentors, ``config``."""
    return json.loads(RELEASED.read_text())


def find_release(path: str) -> dict | None:
    """The release whose file is called as ``path`` is, if there is one."""
    name = PurePosixPath(path).name
    return next((release for release in read_releases() if PurePosixPath(release['url']).name == name), None)


def find_released_config(name: str) -> Path | None:
    """The config of the released segmentor of this name, such as ``recnext_m3_ade20k``, if there is one."""
    configs = (release['config'] for release in read_releases() if release['name'] == name and 'config' in release)
    return next((CONFIGS / config for config in configs), None)
