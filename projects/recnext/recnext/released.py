"""The list of released checkpoints, ``checkpoints/released.json``."""

import json
from pathlib import PurePosixPath

from .paths import RELEASED


def read_releases() -> list[dict]:
    """One dict a file: ``name``, ``task``, ``arch``, ``url``, ``metrics`` and, for segmentors, ``config``."""
    return json.loads(RELEASED.read_text())


def find_release(path: str) -> dict | None:
    """The release whose file is called as ``path`` is, if there is one."""
    name = PurePosixPath(path).name
    return next((release for release in read_releases() if PurePosixPath(release['url']).name == name), None)
