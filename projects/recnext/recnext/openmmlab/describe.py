"""A config as the plain description of :mod:`..checkpoints.folder`, and a description as a config."""

from collections.abc import Iterator

import numpy as np
from mmengine.config import Config
from torch import nn

from ..checkpoints.folder import Description
from ..models.ade20k import ade20k_classes
from ..models.preprocess import Preprocess
from ..models.recnext import get_arch
from ..utils.errors import UserError
from ..utils.paths import CONFIGS
from .segmentor import takes_rgb

BASE = 'fpn_recnext-m3_8xb4-80k_ade20k-512x512.py'
LOADING = ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs')


def describe(cfg: Config, network: nn.Module, classes: list[str], palette: np.ndarray) -> Description:
    """Return what the segmentor of a config is, as plain data.

    Args:
        cfg: Its config.
        network: Its network.
        classes: Names.
        palette: (classes, 3), RGB.

    Raises:
        UserError: in one sentence, that it is another network or another test pipeline than the description covers.
    """
    for reason in _reasons(cfg, network):
        raise UserError(
            'config.json describes RecNeXt with Semantic FPN alone, tested whole after Resize (keep_ratio) and '
            f'ResizeToMultiple; found {reason}.'
        )
    model, preprocessor = cfg.model, network.data_preprocessor
    steps = {step['type']: step for step in _pipeline(cfg)}
    scale = tuple(steps['Resize']['scale']) if 'Resize' in steps else None
    multiple = steps['ResizeToMultiple'].get('size_divisor', 32) if 'ResizeToMultiple' in steps else 1
    head = network.decode_head
    arch = model.backbone.arch
    description = Description(
        network=dict(
            arch=arch if isinstance(arch, str) else get_arch(arch),
            in_channels=model.backbone.get('in_channels', 3),
            fpn_channels=model.neck.out_channels,
            head_channels=head.channels,
            threshold=float(head.threshold) if head.out_channels == 1 else None,
        ),
        preprocess=Preprocess(
            scale, multiple, *(tuple(part.flatten().tolist()) for part in (preprocessor.mean, preprocessor.std))
        ),
        classes=tuple(classes),
        palette=tuple(map(tuple, np.asarray(palette).tolist())),
    )
    expected = {key: tensor.shape for key, tensor in description.build_on_meta().state_dict().items()}
    if expected != {key: tensor.shape for key, tensor in network.state_dict().items()}:
        raise UserError('config.json describes RecNeXt with Semantic FPN alone; this network has other tensors.')
    return description


def _pipeline(cfg: Config) -> list[dict]:
    from .config import test_set

    return test_set(cfg).pipeline


def _reasons(cfg: Config, network: nn.Module) -> Iterator[str]:
    """Yield what the description cannot say."""
    model = cfg.model
    for part, kind in dict(backbone='RecNeXt', neck='FPN', decode_head='FPNHead').items():
        found = model.get(part)
        if not isinstance(found, dict) or found.get('type') != kind:
            yield f'{found.get("type") if isinstance(found, dict) else type(found).__name__} as {part}'
    head, neck, preprocessor = network.decode_head, network.neck, network.data_preprocessor
    if network.align_corners:
        yield 'align_corners=True'
    if (list(head.feature_strides), list(head.in_index)) != ([4, 8, 16, 32], [0, 1, 2, 3]):
        yield f'feature_strides {head.feature_strides}'
    if (model.neck.get('norm_cfg'), model.neck.get('start_level', 0), neck.num_outs) != (None, 0, 4):
        yield 'an FPN with norms, or of other levels'
    if network.test_cfg.mode != 'whole':
        yield f'test_cfg.mode={network.test_cfg.mode}'
    if not (takes_rgb(preprocessor) and preprocessor._enable_normalize):
        yield 'images in BGR, or without normalisation'
    resizing = [step for step in _pipeline(cfg) if step['type'] not in LOADING]
    names = [step['type'] for step in resizing]
    if names not in ([], ['Resize'], ['ResizeToMultiple'], ['Resize', 'ResizeToMultiple']):
        yield f'a test pipeline of {", ".join(names)}'
    for step in resizing:
        known = dict(Resize=('type', 'scale', 'keep_ratio'), ResizeToMultiple=('type', 'size_divisor'))[step['type']]
        other = [key for key in step if key not in known]
        if other or (step['type'] == 'Resize' and not (step.get('keep_ratio') and isinstance(step['scale'], tuple))):
            yield f'{step["type"]} with {", ".join(other) or "keep_ratio=False or a single number"}'


def config_of(description: Description) -> Config:
    """Return the config of a described segmentor: that of the released ones, with its network and preprocessing.

    Raises:
        UserError: its classes are not those of ADE20K, the only ones whose annotations are known here.
    """
    if len(description.classes) != len(ade20k_classes()[0]):
        raise UserError(
            f'It has {len(description.classes)} classes, and how annotations name them it does not say. '
            'Name a config whose test set has these classes, and its model.safetensors as the checkpoint.'
        )
    cfg = Config.fromfile(CONFIGS / BASE, import_custom_modules=False)
    network, preprocess = description.network, description.preprocess
    channels = list(get_arch(network['arch'])['channels'])
    cfg.model.backbone = dict(type='RecNeXt', arch=network['arch'], in_channels=network['in_channels'])
    cfg.model.neck.update(in_channels=channels, out_channels=network['fpn_channels'])
    cfg.model.decode_head.update(in_channels=[network['fpn_channels']] * 4, channels=network['head_channels'])
    cfg.model.data_preprocessor.update(mean=list(preprocess.mean), std=list(preprocess.std))
    resizing = [dict(type='Resize', scale=preprocess.scale, keep_ratio=True)] if preprocess.scale else []
    resizing += [dict(type='ResizeToMultiple', size_divisor=preprocess.multiple)] if preprocess.multiple > 1 else []
    load, labels, pack = (dict(type=name) for name in LOADING)
    cfg.test_dataloader.dataset.pipeline = [load, *resizing, labels, pack]
    cfg.dataset_meta = dict(classes=list(description.classes), palette=[list(one) for one in description.palette])
    return cfg
