"""Where the parts of the project are, and what its configs name relative to it: data and weights to start from."""

import contextlib
import os
import shlex
from pathlib import Path

from platformdirs import user_cache_path

from .errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = PACKAGE.parent / 'configs'
RELEASED = PACKAGE / 'checkpoints' / 'released.json'

CLONE = PACKAGE.parents[2]
"""The folder of the repository, where the package is used from one."""
IN_CLONE = (CLONE / 'tools' / 'train.py').is_file()

HOME = CLONE if IN_CLONE else user_cache_path('recnext')
"""Where data and weights are that configs name; installed without a clone, a folder for what can be had again."""
CHECKPOINTS = HOME / 'checkpoints'

ENGINES = user_cache_path('recnext') / 'engines'
"""Networks converted for other engines, which can be made again; of the user, as a folder may be that of many."""

TOOLS = {
    'predict': 'infer',
    'convert': 'convert_checkpoint',
    'download': 'download_checkpoint',
    'push': 'push_to_hub',
    'web': 'web_demo',
    'make-samples': 'make_sample_dataset',
}
"""Commands whose file in ``tools/`` is called otherwise."""


def find_path(path: str | Path) -> Path | None:
    """The file or folder of that name, from the working directory or else from the project; None if in neither."""
    return next((place for place in (Path(path), HOME / path) if place.exists()), None)


def list_configs() -> list[Path]:
    """The configs to run, without the parts that they are made of."""
    return sorted(CONFIGS.glob('*.py'))


def find_config(name: str | Path) -> Path:
    """A config file by its path, or one of this project by its name alone.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    ours = CONFIGS / f'{path.name.removesuffix(".py")}.py'
    if path.parent == Path() and ours.is_file():
        return ours
    if path.is_dir():
        raise UserError(f'{path} is a folder; expected a config in it.')
    raise UserError(f'No such config: {path}. Those of this project are in {CONFIGS}.')


def command(name: str, *arguments: str) -> str:
    """What a user types for a command: of the clone that is used, or as installed."""
    if not IN_CLONE:
        return shlex.join(['recnext', name, *arguments])
    tool = str(CLONE / 'tools' / f'{TOOLS.get(name, name.replace("-", "_"))}.py')
    with contextlib.suppress(ValueError):  # on Windows, from another drive
        tool = os.path.relpath(tool)
    return shlex.join(['python', tool, *arguments])
