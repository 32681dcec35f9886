"""A segmentor in a folder: ``config.json`` says what it is, ``model.safetensors`` has its weights.

The description is plain data with a schema: our own code alone builds the network of it, and a key that the schema does
not have is refused. So a folder from a stranger can name nothing that would be run, fetched or written.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..models.preprocess import Preprocess
from ..models.recnext import STAGES, get_arch
from ..models.semantic_fpn import RecNeXtSegmentor
from ..utils.errors import UserError, printable
from ..utils.files import atomic_write, make_folder, sha256_of
from .files import CheckpointError, write_safetensors

HUB = 'hf://'
"""How the address of a segmentor on the Hugging Face hub begins."""

DESCRIPTION, WEIGHTS = 'config.json', 'model.safetensors'
"""The files that a segmentor is read from; others beside them are for people."""

SCHEMA, VERSION = 'recnext-segmentor', 1
MAX_BYTES = 1 << 22
"""Of a description; that of a released segmentor has 8 000."""

MAX_CLASSES = 65536
"""Label maps have 16 bits."""

MAX_WIDTH, MAX_DEPTH, MAX_RATIO, MAX_SIDE = 65536, 256, 64, 65536
"""Of a network and of what it sees: what is larger only takes memory from whoever reads it."""

MAX_NUMBER = 1e6
"""Of means, deviations and the like."""


@dataclass(frozen=True)
class Description:
    """What a segmentor is, without its weights.

    Args:
        network: Arguments of :class:`.RecNeXtSegmentor` but for the number of classes and the preprocessing.
        preprocess: From images to what the network sees.
        classes: Names.
        palette: RGB colour of each class, 0 to 255.
        provenance: Where the weights are from: texts by name.
        metrics: Measured or published, per cent by name.
    """

    network: dict
    preprocess: Preprocess
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    provenance: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Return the description as JSON has it."""
        return json.loads(json.dumps(dict(schema=SCHEMA, version=VERSION, **asdict(self))))

    def to_json(self) -> str:
        """Return the text of ``config.json``."""
        return f'{json.dumps(self.to_dict(), indent=1)}\n'

    def write(self, path: Path) -> None:
        """Write the description as JSON."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.to_json())

    def build_on_meta(self) -> RecNeXtSegmentor:
        """Return the network in eval mode without values, on the ``meta`` device."""
        with torch.device('meta'):
            network = RecNeXtSegmentor(num_classes=len(self.classes), preprocess=self.preprocess, **self.network)
        return network.eval()


def parse_description(content: object) -> Description:
    """Read a description from JSON's values.

    Raises:
        UserError: an unknown or missing key, a value of a wrong type, or another schema.
    """
    if isinstance(content, Mapping) and 'architecture' in content and 'config' in content:
        raise UserError(
            'It is of recnext 1, whose configs are no longer read. If it is yours, convert it:\n'
            '  recnext push FOLDER/config.py FOLDER/model.safetensors USER/NAME'
        )
    whole = _take(content, 'config.json', schema=str, version=int, network=dict, preprocess=dict, classes=list,
                  palette=list, provenance=dict, metrics=dict)  # fmt: skip
    if (whole['schema'], whole['version']) != (SCHEMA, VERSION):
        raise UserError(
            f'It has schema {printable(whole["schema"], 50)} {whole["version"]}; expected {SCHEMA} {VERSION}. '
            'A newer recnext may read it: pip install --upgrade.'
        )
    network = _take(whole['network'], 'network', arch=(str, dict), in_channels=int, fpn_channels=int,
                    head_channels=int, threshold=(int, float, type(None)))  # fmt: skip
    if any(not 0 < network[key] <= MAX_WIDTH for key in ('in_channels', 'fpn_channels', 'head_channels')):
        raise UserError(f'Widths of the network lie between 1 and {MAX_WIDTH}.')
    threshold = network['threshold']
    _expect(threshold is None or abs(threshold) <= MAX_NUMBER, 'network.threshold', 'a number or null')
    if isinstance(network['arch'], dict):
        arch = _take(network['arch'], 'network.arch', channels=list, depths=list, mlp_ratio=(int, float),
                     token_mixer=str)  # fmt: skip
        _expect(_is_numbers(arch['channels'], STAGES, 1, MAX_WIDTH, int), 'network.arch.channels', f'{STAGES} widths')
        _expect(_is_numbers(arch['depths'], STAGES, 1, MAX_DEPTH, int), 'network.arch.depths', f'{STAGES} depths')
        _expect(0 < arch['mlp_ratio'] <= MAX_RATIO, 'network.arch.mlp_ratio', f'a number up to {MAX_RATIO}')
        network['arch'] = {**arch, 'channels': tuple(arch['channels']), 'depths': tuple(arch['depths'])}
    get_arch(network['arch'])
    pixels = _take(whole['preprocess'], 'preprocess', scale=(list, type(None)), multiple=int, mean=list, std=list)
    channels = network['in_channels']
    scale = pixels['scale']
    _expect(scale is None or _is_numbers(scale, 2, 1, MAX_SIDE, int), 'preprocess.scale', 'two sides')
    _expect(0 < pixels['multiple'] <= 4096, 'preprocess.multiple', 'a number of pixels')
    _expect(_is_numbers(pixels['mean'], channels, -MAX_NUMBER), 'preprocess.mean', f'{channels} numbers')
    _expect(_is_numbers(pixels['std'], channels, 1e-6), 'preprocess.std', f'{channels} numbers above 0')
    classes, palette = whole['classes'], whole['palette']
    named = all(isinstance(name, str) and name.isprintable() for name in classes)
    _expect(named and 2 <= len(classes) <= MAX_CLASSES, 'classes', 'two printable names or more')
    coloured = all(isinstance(one, list) and _is_numbers(one, 3, 0, 255, int) for one in palette)
    _expect(coloured and len(palette) == len(classes), 'palette', 'an RGB colour of 0 to 255 for each class')
    for key, kind in (('provenance', str), ('metrics', (int, float))):
        _expect(all(isinstance(value, kind) for value in whole[key].values()), key, 'plain values')
    _expect(_is_numbers([*whole['metrics'].values()], len(whole['metrics']), 0), 'metrics', 'numbers')
    return Description(
        network=network,
        preprocess=Preprocess(
            scale=scale and tuple(scale),
            multiple=pixels['multiple'],
            mean=tuple(map(float, pixels['mean'])),
            std=tuple(map(float, pixels['std'])),
        ),
        classes=tuple(classes),
        palette=tuple(map(tuple, palette)),
        provenance=whole['provenance'],
        metrics=whole['metrics'],
    )


def _take(content: object, name: str, **kinds: type | tuple) -> dict:
    """Return a dict with exactly these keys, each of its type; bool is no number here."""
    if not isinstance(content, Mapping):
        raise UserError(f'{name} is a {type(content).__name__}; expected an object.')
    for key in content:
        _expect(key in kinds, f'{name}.{printable(key, 50)}', f'one of the keys {", ".join(kinds)}')
    for key, kind in kinds.items():
        _expect(key in content, f'{name}.{key}', 'a value, and it is missing')
        right = isinstance(content[key], kind) and not isinstance(content[key], bool)
        _expect(right, f'{name}.{key}', 'a value of another type')
    return dict(content)


def _is_numbers(values: Sequence, length: int, least: float, most: float = MAX_NUMBER, kind: type = float) -> bool:
    right = all(isinstance(value, (int, kind)) and not isinstance(value, bool) for value in values)
    return right and len(values) == length and all(least <= value <= most for value in values)


def _expect(right: bool, name: str, expected: str) -> None:
    if not right:
        raise UserError(f'{name} is wrong: expected {expected}.')


def read_folder(folder: str | Path) -> tuple[Description, Path]:
    """Read the description of a segmentor in a folder, and make sure that its weights are those that it is of.

    Returns:
        The description, and the file of the weights.

    Raises:
        UserError: a file is missing, or is refused.
    """
    folder = Path(folder)
    description, weights = read_description(folder / DESCRIPTION), folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f'{folder} has no {WEIGHTS}.')
    with weights.open('rb') as file:
        start = file.read(9)
    if start[8:] != b'{':
        raise CheckpointError(f'{weights} is no safetensors file, whatever it is called: it begins with {start!r}.')
    expected, found = description.provenance.get('sha256'), sha256_of(weights)
    if expected != found:
        shown = printable(expected, 64)
        raise CheckpointError(f'{weights} is not what was saved: found sha256 {found},\n  expected {shown}.')
    return description, weights


def read_description(path: Path) -> Description:
    """Read ``config.json``.

    Raises:
        UserError: it is no such file, or is refused.
    """
    try:
        with path.open('rb') as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f'It has more than {MAX_BYTES} bytes.')
        return parse_description(json.loads(text))
    except UserError as error:
        raise UserError(f'{path} is refused: {error}') from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path} describes no segmentor: {type(error).__name__}: {printable(error, 200)}') from None


def write_folder(folder: str | Path, description: Description, weights: Mapping[str, Tensor]) -> None:
    """Write a segmentor: its description and its weights, whose SHA-256 goes into the description.

    Raises:
        UserError: the folder cannot be written, or the description would be refused.
    """
    folder = Path(folder)
    make_folder(folder)
    # Both are written before either takes its place: an interruption leaves the segmentor that was there.
    with atomic_write(folder / DESCRIPTION) as description_file, atomic_write(folder / WEIGHTS) as weights_file:
        write_safetensors(weights, weights_file, {})
        provenance = {**description.provenance, 'sha256': sha256_of(weights_file)}
        described = replace(description, provenance=provenance)
        parse_description(described.to_dict())
        description_file.write_text(described.to_json())


def pull_segmentor(address: str, with_weights: bool = True) -> Path:
    """Download a segmentor from the hub into its cache, unless it is there, and return its folder.

    Args:
        address: ``hf://user/name`` or ``hf://user/name@revision``.
        with_weights: Download ``model.safetensors`` as well as ``config.json``.

    Raises:
        UserError: it cannot be had, its description is refused, or the weights are not those that it is of.
    """
    from .hub import parse_repository, pull_description, pull_weights

    repository = parse_repository(address)
    description = pull_description(repository)
    read_description(description)  # before the weights: what is refused should not take the time
    if with_weights:
        weights = pull_weights(repository, description)
        try:
            read_folder(description.parent)
        except CheckpointError as error:
            weights.resolve().unlink()  # the cache would hand it out for ever; what stands there is a link
            raise CheckpointError(
                f'{repository}: {error}\n  It was removed; the same command fetches it anew.'
            ) from None
    return description.parent
