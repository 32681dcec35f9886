"""Mistakes in a config, found before a run: names that nothing takes, values of a wrong type, parts that do not fit.

By general rules: the constructors say which names they take, and the network, without memory, which shapes.
"""

import difflib
import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    FUNCTIONS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TASK_UTILS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    init_default_scope,
)
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, TestLoop, ValLoop
from torch import nn
from torch.utils.data import DataLoader

from ..utils.errors import UserError, first_line
from .builder import build_on_meta
from .dataset_rules import build_preprocessor
from .guarded_pipeline import GuardedPipeline
from .listing import leaves

RUNNER_KEYS = frozenset(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}
LOOP_KEYS = ('train_cfg', 'val_cfg', 'test_cfg')
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
OTHERS = (
    'model', 'data_preprocessor', 'optim_wrapper', 'param_scheduler', 'val_evaluator', 'test_evaluator',
    'default_hooks', 'custom_hooks', 'visualizer',
)  # fmt: skip

REGISTRIES = (
    MODELS, DATASETS, TRANSFORMS, DATA_SAMPLERS, OPTIM_WRAPPERS, OPTIMIZERS, PARAM_SCHEDULERS, HOOKS, METRICS,
    EVALUATOR, VISUALIZERS, VISBACKENDS, LOOPS, TASK_UTILS,
)  # fmt: skip

SINGLE_HEADED = ('FastEncoderDecoder', 'RecNeXtEncoderDecoder')

ALIKE = 0.8
"""How alike two names are, of 1, for one to be taken for a misspelling of the other."""

LARGE = 256
"""Height and width of images that every network takes; divisible by all strides."""

OF_OTHER_LIBRARIES = frozenset(('Albu',))
"""Parts whose own parts no registry of MMEngine has."""

Maker = type | Callable[..., object]
"""What a registry holds: classes, and some functions."""

EVERYWHERE = frozenset(('type', '_scope_', '_delete_'))
BESIDE = {
    # What mmengine takes out before it builds what stands there.
    'optim_wrapper': frozenset(('constructor', 'paramwise_cfg')),
    'param_scheduler': frozenset(('convert_to_iter_based', 'epoch_length')),
    'hooks': frozenset(('priority',)),
    'dataloader': frozenset(('dataset', 'num_batch_per_epoch', 'disable_subprocess_warning')),
}


def check_keys(cfg: Config) -> None:
    """Make sure that everything in a config is taken by what it is for.

    Raises:
        UserError: naming the key that is misspelt, or whose value is of a wrong type.
    """
    for key in cfg:
        meant = None if key in RUNNER_KEYS else _similar(key, RUNNER_KEYS)
        if meant:
            raise UserError(f'The config has {key}, which nothing reads; did you mean {meant}?')
    _check_heads(cfg.get('model') or {})
    scope = cfg.get('default_scope') or 'mmengine'
    for key in (*OTHERS, *LOADERS, *LOOP_KEYS):
        value = cfg.get(key)
        if value is None:
            continue
        if isinstance(value, str | numbers.Number):
            raise UserError(f'{key} is {value!r}; expected a dict.')
        if key in LOADERS:
            _check_arguments(DataLoader, value, key, BESIDE['dataloader'])
        elif key in LOOP_KEYS and 'type' not in value:
            loop = {'val_cfg': ValLoop, 'test_cfg': TestLoop}.get(key)
            loop = loop or (EpochBasedTrainLoop if value.get('by_epoch') else IterBasedTrainLoop)
            _check_arguments(loop, value, key, frozenset(('by_epoch',)))
        _check_node(value, key, scope)


def _check_heads(model_cfg: dict) -> None:
    """Refuse several heads where one is expected: only the word for the segmentor has been changed."""
    heads, kind = model_cfg.get('decode_head'), model_cfg.get('type')
    if kind in SINGLE_HEADED and isinstance(heads, list | tuple):
        raise UserError(
            f'model.decode_head has {len(heads)} heads, one after the other, and {kind} takes one. Cascades '
            "(CascadeEncoderDecoder) train and test with mmseg's own tools."
        )


def _check_node(node: object, path: str, scope: str) -> None:
    """Check a part of a config and all parts in it."""
    if isinstance(node, list | tuple):
        for index, part in enumerate(node):
            _check_node(part, f'{path}.{index}', scope)
    if not isinstance(node, dict):
        return
    scope = node.get('_scope_') or scope
    if isinstance(node.get('type'), str):
        _check_arguments(_find_class(node['type'], path, scope), node, path, _beside(path))
        if node['type'] in OF_OTHER_LIBRARIES:
            return
    for key, part in node.items():
        # Norms, activations and the like are built in ways of their own, and the model's train_cfg is free.
        if not key.endswith('_cfg'):
            _check_node(part, f'{path}.{key}', scope)


def _beside(path: str) -> frozenset[str]:
    place = path.split('.')[0]
    return BESIDE.get('hooks' if place.endswith('_hooks') else place, frozenset())


def _find_class(name: str, path: str, scope: str) -> Maker:
    """What a ``type`` stands for.

    Raises:
        UserError: nothing of that name.
    """
    known: set[str] = set()
    for registry in REGISTRIES:
        with registry.switch_scope_and_registry(scope) as inside:
            found = inside.get(name)
            if found is not None:
                return found
            while inside is not None:
                known.update(inside.module_dict)
                inside = inside.parent
    if FUNCTIONS.get(name) is not None:
        return FUNCTIONS.get(name)
    raise UserError(f'{path}.type is {name!r}, and nothing is called so.{_did_you_mean(name, known)}')


class Accepted(NamedTuple):
    """The arguments of a constructor."""

    parameters: dict[str, inspect.Parameter]
    open: bool
    """Whether it takes others as well, and hands them on or drops them."""


def _accepted(made: Maker) -> Accepted:
    """The arguments of a class or function, and those of the classes above that its ``**kwargs`` may reach."""
    above = made.__mro__ if inspect.isclass(made) else ()
    makers = [vars(part)['__init__'] for part in above if '__init__' in vars(part)]
    makers = makers or [made]
    parameters: dict[str, inspect.Parameter] = {}
    for place, maker in enumerate(makers):
        found = dict(inspect.signature(maker).parameters)
        parameters = {**found, **parameters}
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in found.values()):
            return Accepted(parameters, place > 0)
    return Accepted(parameters, True)


def _check_arguments(made: Maker, node: dict, path: str, beside: frozenset[str]) -> None:
    accepted = _accepted(made)
    names = {name for name in accepted.parameters if name not in ('self', 'args', 'kwargs')} | beside
    for key, value in node.items():
        if key in EVERYWHERE | beside:
            continue
        if key in names:
            _check_value(accepted.parameters[key], value, f'{path}.{key}')
            continue
        hint = _did_you_mean(key, names)
        if hint or not accepted.open:
            raise UserError(f'{path}.{key} is unknown: {made.__name__} takes no {key}.{hint}')


def _check_value(parameter: inspect.Parameter, value: object, path: str) -> None:
    """Refuse a text where the constructor expects a number, or yes or no."""
    if not isinstance(value, str):
        return
    default, kind = parameter.default, parameter.annotation
    if isinstance(default, bool) or kind in (bool, 'bool'):
        expected = 'True or False'
    elif isinstance(default, numbers.Number) or kind in (int, float, 'int', 'float'):
        expected = 'a number'
    else:
        return
    raise UserError(f'{path} is the text {value!r}; expected {expected}.')


def check_optimizer(cfg: Config) -> None:
    """Make the optimizer of a config for a single weight: it refuses what it cannot work with.

    Raises:
        UserError: it does; with its reason.
    """
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not optimizer:
        return
    try:
        OPTIMIZERS.build({**optimizer, 'params': [nn.Parameter(torch.zeros(1))]})
    except Exception as error:
        settings = ', '.join(f'{key}={value!r}' for key, value in optimizer.items())
        raise UserError(f'optim_wrapper.optimizer ({settings}) cannot be built: {first_line(error)}') from None


def _similar(name: str, known: Iterable[str]) -> str | None:
    """The known name that this one is most probably meant to be."""
    return next(iter(difflib.get_close_matches(name, known, 1, ALIKE)), None)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    meant = _similar(name, sorted(known))
    return f' Did you mean {meant}?' if meant else ''


def check_parts_fit(cfg: Config, segmentation: bool, processes: int = 1, meta_model: nn.Module | None = None) -> None:
    """Make sure that the parts of the network fit together, and that a batch of training goes through it.

    Args:
        cfg: Of the run, whose training set has been checked.
        segmentation: Whether its model is a segmentor.
        processes: That compute the statistics of norms together.
        meta_model: The network of ``cfg``; None means that it is yet to be built.

    Raises:
        UserError: naming the setting that does not fit.
    """
    init_default_scope('mmseg' if segmentation else 'mmpretrain')
    dataset = DATASETS.build(next(leaves(cfg.train_dataloader.dataset)))
    sample = GuardedPipeline(dataset)(dataset.get_data_info(0))
    given = {key: [sample[key]] for key in ('inputs', 'data_samples')}
    padded = tuple(build_preprocessor(cfg, segmentation)(given, segmentation)['inputs'].shape[-2:])
    crops = [step.crop_size for step in dataset.pipeline.transforms if type(step).__name__ == 'RandomCrop']
    crop = crops[0] if crops and not isinstance(crops[0], int) else (*crops, *crops, *padded)[:2]
    model = (meta_model or build_on_meta(cfg.model)).train()
    if min(crop) < LARGE:
        stride = _largest_stride(model.backbone)
        if min(crop) < stride:
            raise UserError(
                f'Training cuts images to {crop[0]} × {crop[1]}, and a cell of the last feature map stands for '
                f'{stride} × {stride} pixels. Set crop_size in train_dataloader.dataset.pipeline to {stride} or more.'
            )
    _pass(model, cfg.train_dataloader.get('batch_size', 1) * processes, padded)


def _largest_stride(backbone: nn.Module) -> int:
    """Pixels to a cell of a backbone's coarsest feature map, to a side; 0 where that cannot be found out."""
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
            if _wants_values(error):
                return
            raise UserError(_misfit(name, part, before, given, size, error)) from None
        if name in ('backbone', 'neck'):
            given, before = out, f'model.{name}'


def _wants_values(error: Exception) -> bool:
    """Whether a part failed because tensors without values went in: it reads a number off one, as some heads do."""
    return isinstance(error, RuntimeError) and 'meta' in str(error).lower()


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
    before: str,
    given: torch.Tensor | Sequence[torch.Tensor],
    size: tuple[int, int],
    error: Exception,
) -> str:
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
