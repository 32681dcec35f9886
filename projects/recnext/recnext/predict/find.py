"""Segmentors that bring their own weights: released ones, those of the Hugging Face hub, and folders of such."""

from pathlib import Path

from ..checkpoints.download import find_released_weights
from ..checkpoints.files import CheckpointError
from ..checkpoints.hub import DESCRIPTION, SCHEME, WEIGHTS, Repository, parse_repository, pull_description, pull_weights
from ..openmmlab.stored_config import load_stored_config, read_description
from ..utils.errors import UserError, printable
from ..utils.files import sha256_of


def find_trained(name: str) -> tuple[str, str]:
    """Config and weights of a segmentor, downloaded first if they are not there.

    Args:
        name: A folder that :func:`push.write_segmentor` wrote; ``hf://user/name`` or ``hf://user/name@revision``; or
            the name of a released segmentor.

    Raises:
        UserError: there is none of that name, it cannot be had, or it is refused.
    """
    if Path(name).is_dir():
        description, weights = Path(name, DESCRIPTION), Path(name, WEIGHTS)
        check_weights(description, weights)
    elif name.startswith(SCHEME):
        description, weights = pull_segmentor(parse_repository(name))
    else:
        return name, str(find_released_weights(name))
    return str(description.parent), str(weights)


def pull_segmentor(repository: Repository) -> tuple[Path, Path]:
    """Download a segmentor from the hub, unless the cache has it: its description and its weights, in one folder.

    Raises:
        UserError: it cannot be had, or the weights are not those that the description is of.
    """
    description = pull_description(repository)
    # Before the weights: what is refused should not take the time.
    load_stored_config(description)
    weights = pull_weights(repository, description)
    try:
        check_weights(description, weights)
    except CheckpointError as error:
        # The cache would hand it out for ever; what stands there is a link.
        weights.resolve().unlink()
        raise CheckpointError(f'{repository}: {error}\n  It was removed; the same command fetches it anew.') from None
    return description, weights


def check_weights(description: Path, weights: Path) -> None:
    """Make sure that weights are those that a description is of, and safetensors.

    Raises:
        UserError: they are not, or one of the files is missing.
    """
    expected = read_description(description)['weights']['sha256']
    if not weights.is_file():
        raise UserError(f'{weights.parent} has no {WEIGHTS}.')
    found = sha256_of(weights)
    if found != expected:
        expected = printable(expected, 64)
        raise CheckpointError(f'{weights} is not what was pushed: found sha256 {found},\n  expected {expected}.')
    with weights.open('rb') as file:
        start = file.read(9)
    if start[8:] != b'{':
        raise CheckpointError(f'{weights} is no safetensors file, whatever it is called: it begins with {start!r}.')
