"""A segmentor small enough to train it many times over, as a config on top of the demo's."""

from pathlib import Path

import torch
from mmengine.config import Config

from helpers.networks import randomise_norms
from helpers.reference import SEGMENTOR_CONFIGS
from projects.recnext.recnext.checkpoints.files import write_checkpoint
from projects.recnext.recnext.openmmlab.builder import build_without_weights

DEMO_CONFIG = next(path for path in SEGMENTOR_CONFIGS if 'sample-scenes' in path.name)


def write_tiny_config(folder: Path, data_root: Path, extra: str = '') -> Path:
    """Write a config that trains on 64 × 64 crops, two images at a time, and keeps every checkpoint."""
    path = folder / 'tiny.py'
    path.write_text(f"""
_base_ = [{str(DEMO_CONFIG)!r}]
arch = dict(_delete_=True, channels=(8, 16, 32, 64), depths=(1, 1, 1, 1), mlp_ratio=2, token_mixer='conv')
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(arch=arch, drop_path_rate=0.2),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    decode_head=dict(in_channels=[16, 16, 16, 16], channels=16),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(64, 64)),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
root = {str(data_root)!r}
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(pipeline=train_pipeline, data_root=root))
val_dataloader = dict(num_workers=0, dataset=dict(data_root=root))
test_dataloader = dict(num_workers=0, dataset=dict(data_root=root))
train_cfg = dict(max_iters=8, val_interval=1000)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, save_best=None))
{extra}
""")
    return path


def write_tiny(folder: Path) -> tuple[Path, Path]:
    """Write a tiny config, and a checkpoint whose label maps have several classes."""
    config = write_tiny_config(folder, folder)
    torch.manual_seed(0)
    segmentor = build_without_weights(Config.fromfile(config).model)
    segmentor.init_weights()
    randomise_norms(segmentor)
    torch.nn.init.normal_(segmentor.decode_head.conv_seg.weight)
    write_checkpoint(dict(state_dict=segmentor.state_dict()), folder / 'tiny.pth')
    return config, folder / 'tiny.pth'
