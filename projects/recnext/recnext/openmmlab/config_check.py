"""Mistakes in a config: what mmengine and Python say of them in one line, and parts of a network that do not fit."""

import contextlib
import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import mmengine.registry
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, Registry, init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ..utils.errors import UserError, first_line

RUNNER_KEYS = frozenset(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}

SIMILAR = 0.8
"""Similarity (0-1) above which a name counts as a typo of another."""

LARGE = 256
"""Height and width of images that every network takes; divisible by all strides."""

REGISTRIES = [registry for registry in vars(mmengine.registry).values() if isinstance(registry, Registry)]

MISTAKES = (TypeError, KeyError, ValueError, AssertionError)
"""Errors that constructors raise over their arguments."""


def check_keys(cfg: Config) -> None:
    """Refuse a misspelt setting of the Runner, which would not be read and not be missed.

    Raises:
        UserError: naming the key that was probably meant.
    """
    for key in cfg:
        if key not in RUNNER_KEYS and (meant := _similar(key, RUNNER_KEYS)):
            raise UserError(f'The config has {key}, which nothing reads; did you mean {meant}?')


@contextlib.contextmanager
def named_mistakes(part: str, cfg: object) -> Iterator[None]:
    """Make one line for the user of what a constructor has against its arguments.

    Args:
        part: What is built, such as ``'model'``; of all that a run builds, ``''``, only misspelt names are told apart.
        cfg: Its config.

    Raises:
        UserError: naming the setting, the reason, and what was probably meant.
    """
    try:
        yield
    except MISTAKES as error:
        message = _explain(str(error), part, cfg)
        if part:
            message = message or f'{part} cannot be built: {type(error).__name__}: {first_line(error)}'
        if message is None:
            raise
        raise UserError(message) from error


def _explain(message: str, part: str, cfg: object) -> str | None:
    if match := re.search(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'", message):
        name, argument = match.groups()
        path = _find_path(cfg, part, lambda key, value: key == argument)
        return path and f'{path} is unknown: {name} takes no {argument}.{_did_you_mean(argument, _arguments(name))}'
    if match := re.search(r'([\w.]+) is not in the \S+::([\w ]+) registry', message):
        name, kind = match.groups()
        path = _find_path(cfg, part, lambda key, value: key == 'type' and value == name)
        return path and f'{path} is {name!r}, which is not registered.{_did_you_mean(name, _registered(kind))}'
    return None


def _find_path(node: object, path: str, wanted: Callable[[object, object], bool]) -> str | None:
    """Return the dotted name of the first setting in a config for which ``wanted(key, value)`` is true."""
    items = (
        node.items() if isinstance(node, dict | Config) else enumerate(node) if isinstance(node, list | tuple) else ()
    )
    for key, value in items:
        inside = f'{path}.{key}'.removeprefix('.')
        found = inside if wanted(key, value) else _find_path(value, inside, wanted)
        if found:
            return found
    return None


def _arguments(name: str) -> set[str]:
    """Return what a class takes by name, with what its ``**kwargs`` reach in the classes above."""
    makers = [DataLoader, *(made for registry in REGISTRIES for made in _all_registered(registry).values())]
    named = (made for made in makers if getattr(made, '__name__', None) == name)
    constructors = (vars(above).get('__init__', above) for made in named for above in getattr(made, '__mro__', [made]))
    return {name for made in constructors if made is not object for name in inspect.signature(made).parameters}


def _registered(kind: str) -> set[str]:
    return {name for registry in REGISTRIES if registry.name == kind for name in _all_registered(registry)}


def _all_registered(registry: Registry) -> dict[str, object]:
    """Return what a registry holds by name, with those of mmseg and others below it."""
    found = dict(registry.module_dict)
    for below in registry.children.values():
        found.update(_all_registered(below))
    return found


def _similar(name: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, sorted(known), 1, SIMILAR)), None)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    meant = _similar(name, known)
    return f' Did you mean {meant}?' if meant else ''


def check_parts_fit(cfg: Config, segmentation: bool, meta_model: nn.Module, sync_world_size: int = 1) -> None:
    """Make sure that the parts of the network fit together, and that a batch of training goes through it.

    Args:
        cfg: Of the run, whose training set has been checked.
        segmentation: Whether its model is a segmentor.
        meta_model: The network, on the ``meta`` device.
        sync_world_size: Processes that compute the statistics of norms together.

    Raises:
        UserError: naming the setting that does not fit.
    """
    from .dataset_rules import build_preprocessor
    from .guarded_pipeline import GuardedPipeline
    from .listing import leaves

    init_default_scope('mmseg' if segmentation else 'mmpretrain')
    with named_mistakes('train_dataloader.dataset', cfg.train_dataloader.dataset):
        dataset = DATASETS.build(next(leaves(cfg.train_dataloader.dataset)))
    sample = GuardedPipeline(dataset)(dataset.get_data_info(0))
    batch = {key: [sample[key]] for key in ('inputs', 'data_samples')}
    padded = tuple(build_preprocessor(cfg, segmentation)(batch, segmentation)['inputs'].shape[-2:])
    crops = [step.crop_size for step in dataset.pipeline.transforms if type(step).__name__ == 'RandomCrop']
    crop = crops[0] if crops and not isinstance(crops[0], int) else (*crops, *crops, *padded)[:2]
    meta_model.train()
    if min(crop) < LARGE:
        stride = _largest_stride(meta_model.backbone)
        if min(crop) < stride:
            raise UserError(
                f'Training cuts images to {crop[0]} × {crop[1]}, and a cell of the last feature map stands for '
                f'{stride} × {stride} pixels. Set crop_size in train_dataloader.dataset.pipeline to {stride} or more.'
            )
    _pass(meta_model, cfg.train_dataloader.get('batch_size', 1) * sync_world_size, padded)


def _largest_stride(backbone: nn.Module) -> int:
    """Return the pixels to a cell of a backbone's coarsest feature map, to a side; 0 if that cannot be found out."""
    try:
        maps = backbone(torch.empty(2, 3, LARGE, LARGE, device='meta'))
    except Exception:  # _pass says what is wrong with it
        return 0
    return round(LARGE / min(one.shape[-2] for one in maps))


def _pass(model: nn.Module, batch: int, size: tuple[int, int]) -> None:
    """Send images of a size through each part of a network; nothing is computed."""
    given, before = torch.empty(batch, 3, *size, device='meta'), 'the images'
    for name, part in _parts(model):
        try:
            out = part(given)
        except Exception as error:
            if isinstance(error, RuntimeError) and 'meta' in str(error).lower():
                return  # it reads a number off a tensor, as some heads do, and these have no values
            raise UserError(_misfit(name, part, (before, given), size, error)) from None
        if name in ('backbone', 'neck'):
            given, before = out, f'model.{name}'


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name in ('backbone', 'neck', 'decode_head', 'auxiliary_head', 'head'):
        part = getattr(model, name, None)
        if isinstance(part, nn.ModuleList):
            yield from ((f'{name}.{index}', head) for index, head in enumerate(part))
        elif part is not None:
            yield name, part


def _misfit(
    name: str,
    part: nn.Module,
    source: tuple[str, torch.Tensor | Sequence[torch.Tensor]],
    size: tuple[int, int],
    error: Exception,
) -> str:
    before, given = source
    maps = list(given) if isinstance(given, list | tuple) else [given]
    if 'more than 1 value per channel' in str(error):
        return (
            f'model.{name} cannot be trained on batches of {len(maps[0])} images of {size[0]} × {size[1]}: batch '
            'normalisation is left with a single value a channel. Raise train_dataloader.batch_size or the crop.'
        )
    channels = ', '.join(str(one.shape[1]) for one in maps)
    takes = getattr(part, 'in_channels', None)
    expected = f' model.{name}.in_channels is {takes}.' if takes is not None else ''
    return f'model.{name} does not fit: {before} gives {channels} channels.{expected} ({first_line(error)})'
