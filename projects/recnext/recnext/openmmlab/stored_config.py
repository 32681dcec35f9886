"""A config as data: written whole as JSON, read without running anything, for segmentors that come from strangers.

A Python config is a program, and so is much of what MMEngine would do with one as data: ``custom_imports`` imports any
module, ``type`` may be the path of any function, hooks and visualizers write where they are told. So of a stored config
only the network and how it is tested is taken, in parts whose classes are of the libraries below; the rest is ours.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATA_SAMPLERS, DATASETS, FUNCTIONS, METRICS, MODELS, TRANSFORMS
from mmengine.utils import import_modules_from_strings

from ..checkpoints.hub import DESCRIPTION
from ..utils.errors import UserError, printable
from ..utils.paths import CONFIGS

TAKEN = dict(
    model=dict, crop_size=tuple, test_pipeline=list, test_dataloader=dict, test_evaluator=dict | list,
    tta_pipeline=list, tta_model=dict,
)  # fmt: skip
"""What is taken of a stored config, and its type."""

RUNTIME = CONFIGS / '_base_' / 'default_runtime.py'
"""Where the rest comes from."""

IMPORTED = re.compile(r'(projects\.recnext\.recnext|mmseg|mmpretrain)(\.[a-z]\w*)*')
SCOPES = ('mmengine', 'mmseg', 'mmpretrain')
REGISTRIES = (MODELS, TRANSFORMS, DATASETS, DATA_SAMPLERS, METRICS, FUNCTIONS)
LIBRARIES = (
    *('projects.recnext.recnext', 'mmengine.model', 'mmengine.dataset', 'mmcv', 'torch.nn'),
    *('mmseg.models', 'mmseg.datasets', 'mmseg.evaluation', 'mmpretrain.models.backbones', 'mmpretrain.models.necks'),
)
"""Modules, with what is in them, whose parts a stored config may name."""

FETCHING = ('mmseg.models.backbones.vpd', 'mmseg.models.text_encoder')
"""Of these all but what fetches networks, or programs, of its own; as MMPretrain's multimodal models do."""

PLACES = ('init_cfg', 'pretrained', 'checkpoint_path', 'output_dir', 'collect_dir', 'backend_args', 'file_client_args')
"""Arguments that name weights to start from, folders to write in and servers to ask: those of the machine where the
network was trained. They are left out."""

READ = re.compile(r'://|^hf[-_]hub:|(^|\.)pickle$|\.(pkl|npy|pth|pt|ckpt|bin)$')
"""What a text looks like that MMEngine would fetch, or read as a pickle: ``class_weight`` of a loss, for one."""

NAMING = ('type', 'collate_fn', 'worker_init_fn')
"""Keys whose value MMEngine looks up by name."""

TUPLE = '__tuple__'
"""JSON has no tuples, and mmcv tells them from lists."""

LARGEST = 1 << 22
"""Bytes of a description. That of a released segmentor has 25 000."""


class StoredConfigError(UserError):
    """A config that cannot be stored, or a stored one that is refused."""


def encode_config(cfg: Config) -> dict:
    """A whole config as JSON has it.

    Raises:
        StoredConfigError: it holds what is no plain data.
    """
    content = cfg.to_dict()
    encoded = _encode(content)
    try:
        same = decode_config(json.loads(json.dumps(encoded, allow_nan=False))) == content
    except (TypeError, ValueError):
        same = False
    if not same:
        raise StoredConfigError(
            f'{cfg.filename} holds more than texts, numbers, lists and dicts; only these are stored.'
        )
    return encoded


def _encode(value: object) -> object:
    if isinstance(value, dict):
        return {key: _encode(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return {TUPLE: [_encode(part) for part in value]}
    return [_encode(part) for part in value] if isinstance(value, list) else value


def decode_config(value: object) -> object:
    """What :func:`encode_config` was given, as plain data."""
    if isinstance(value, dict):
        parts = {key: decode_config(part) for key, part in value.items()}
        return tuple(parts[TUPLE]) if parts.keys() == {TUPLE} and isinstance(parts[TUPLE], list) else parts
    return [decode_config(part) for part in value] if isinstance(value, list) else value


def read_description(path: Path) -> dict:
    """Read the ``config.json`` of a segmentor: JSON with the keys that recnext push writes.

    Raises:
        StoredConfigError: it is something else.
    """
    try:
        with path.open('rb') as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f'more than {LARGEST} bytes')
        content = json.loads(text)
        classes, palette = content['classes'], content['palette']
        colours = [colour for colour in palette if len(colour) == 3 and all(value in range(256) for value in colour)]
        whole = len(classes) == len(palette) == len(colours) and all(name.isprintable() for name in classes)
        if not whole or not re.fullmatch(r'[\w-]+', content['name']):
            raise ValueError('classes, palette or name are not what they should be')
        if not all(isinstance(content[key], dict) for key in ('config', 'weights', 'source')):
            raise ValueError('config, weights and source should be dicts')
        if not isinstance(content['weights']['sha256'], str):
            raise ValueError('the SHA-256 of the weights is missing')
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = printable(f'{type(error).__name__}: {error}', 200)
        raise StoredConfigError(f'{path} is no {DESCRIPTION} of a segmentor. ({reason})') from None
    return content


def load_stored_config(path: Path) -> Config:
    """The config in the ``config.json`` of a segmentor, as far as it is taken; see above.

    Raises:
        StoredConfigError: it is refused, with the name of what it wanted.
    """
    content = read_description(path)
    try:
        whole = decode_config(content['config'])
        _import(whole.get('custom_imports') or {})
        taken = {key: _without_places(whole[key]) for key in TAKEN if whole.get(key) is not None}
        wrong = [key for key, part in taken.items() if not isinstance(part, TAKEN[key])]
        if wrong:
            raise StoredConfigError(f'{wrong[0]} is a {type(taken[wrong[0]]).__name__}.')
        _check_parts(taken, '')
    except StoredConfigError as error:
        raise StoredConfigError(f'{path} is refused: {error} Nothing of it was run.') from None
    except RecursionError:
        raise StoredConfigError(f'{path} is refused: it nests without end.') from None
    meta = dict(classes=content['classes'], palette=content['palette'])
    ours = dict(Config.fromfile(RUNTIME).to_dict(), test_cfg=dict(type='TestLoop'), dataset_meta=meta)
    return Config({**ours, **taken}, cfg_text=json.dumps(whole), filename=f'{content["name"]}.py')


def _import(custom_imports: object) -> None:
    """Import what a config asks for, if it is of this project, mmseg or mmpretrain.

    Raises:
        StoredConfigError: it is of anything else.
    """
    names = custom_imports.get('imports') or [] if isinstance(custom_imports, dict) else custom_imports
    for name in names if isinstance(names, list | tuple) else [names]:
        if not isinstance(name, str) or not IMPORTED.fullmatch(name):
            raise StoredConfigError(f'custom_imports wants {printable(name, 100)}, which is not of a known library.')
        try:
            import_modules_from_strings(name)
        except ImportError as error:
            raise StoredConfigError(f'custom_imports wants {name}, which cannot be imported: {error}.') from None


def _without_places(part: object) -> object:
    if isinstance(part, dict):
        return {key: _without_places(inside) for key, inside in part.items() if key not in PLACES}
    return type(part)(map(_without_places, part)) if isinstance(part, list | tuple) else part


def _check_parts(part: object, path: str) -> None:
    """Refuse what no library has registered, wherever a part of a config names it, and files to read as pickles."""
    if isinstance(part, dict):
        for key, inside in part.items():
            place = f'{path}.{key}'.lstrip('.')
            if key == '_scope_' and inside not in SCOPES:
                raise StoredConfigError(f'{place} is {printable(inside, 100)}, which is no known library.')
            if key in NAMING and not isinstance(inside, dict) and not _is_known(inside):
                raise StoredConfigError(f'{place} is {printable(inside, 100)}, which no known library has registered.')
            _check_parts(inside, place)
    elif isinstance(part, list | tuple):
        for index, inside in enumerate(part):
            _check_parts(inside, f'{path}.{index}')
    elif isinstance(part, str) and READ.search(part):
        raise StoredConfigError(f'{path} wants to read {printable(part, 100)}.')


def _is_known(kind: object) -> bool:
    """Whether a registry has a part of that name, of one of the :data:`LIBRARIES`.

    Not by :meth:`Registry.get`, which takes a name that it does not know for the path of something to import.
    """
    scope, _, name = str(kind).rpartition('.')
    return scope in ('', *SCOPES) and any(_is_allowed(part) for part in _registered(scope or 'mmseg', name))


def _registered(scope: str, name: str) -> Iterator[object]:
    for registry in REGISTRIES:
        with registry.switch_scope_and_registry(scope) as inside:
            inside.import_from_location()
            while inside is not None:
                if name in inside.module_dict:
                    yield inside.module_dict[name]
                    break
                inside = inside.parent


def _is_allowed(part: object) -> bool:
    module = getattr(part, '__module__', '')
    return _is_in(module, LIBRARIES) and not _is_in(module, FETCHING)


def _is_in(module: str, places: tuple[str, ...]) -> bool:
    return any(f'{module}.'.startswith(f'{place}.') for place in places)
