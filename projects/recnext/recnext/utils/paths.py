"""Where the parts of the project are, and what its configs name relative to it: data and weights to start from."""

from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[4]
CONFIGS = PROJECT_ROOT / 'projects' / 'recnext' / 'configs'
CHECKPOINTS = PROJECT_ROOT / 'checkpoints'
RELEASED = CHECKPOINTS / 'released.json'


def find_path(path: str | Path) -> Path | None:
    """The file or folder of that name, from the working directory or else from the project; None if in neither."""
    return next((place for place in (Path(path), PROJECT_ROOT / path) if place.exists()), None)
