"""Small segmentors of mmseg's and of ours with the same weights, and images for them."""

import copy

import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from helpers.networks import randomise_norms

ARCH = dict(channels=(8, 16, 32, 64), depths=(1, 1, 1, 1), mlp_ratio=2, token_mixer='conv')


MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


NORM = dict(type='BN')


SIZE = (96, 128)

BOUNDS = {torch.float32: (1e-5, 0.999), torch.float16: (0.01, 0.985), torch.bfloat16: (0.06, 0.92)}
"""The largest difference of a logit, as a part of the largest logit, and the least share of equal labels."""


def recnext_cfg(classes=7, align_corners=False, mode='whole', head={}, neck={}):
    return dict(
        data_preprocessor=dict(type='SegDataPreProcessor', mean=MEAN, std=STD, bgr_to_rgb=True),
        backbone=dict(type='RecNeXt', arch=ARCH, out_indices=(0, 1, 2, 3), norm_cfg=NORM),
        neck={**dict(type='FPN', in_channels=[8, 16, 32, 64], out_channels=16, num_outs=4), **neck},
        decode_head={
            **dict(
                type='FPNHead',
                in_channels=[16, 16, 16, 16],
                in_index=[0, 1, 2, 3],
                feature_strides=[4, 8, 16, 32],
                channels=16,
                num_classes=classes,
                norm_cfg=NORM,
                align_corners=align_corners,
            ),
            **head,
        },
        test_cfg=dict(mode='slide', crop_size=(64, 64), stride=(48, 40)) if mode == 'slide' else dict(mode='whole'),
    )


def resnet_cfg(classes=7, align_corners=False, mode='whole', backbone='ResNetV1c'):
    cfg = recnext_cfg(classes, align_corners, mode)
    del cfg['neck']
    cfg['backbone'] = dict(type=backbone, depth=18, base_channels=8, norm_cfg=NORM, num_stages=4)
    if backbone == 'ResNetV1c':
        cfg['backbone'].update(stem_channels=8, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1))
    cfg['decode_head'] = dict(
        type='FCNHead',
        in_channels=64,
        in_index=3,
        channels=16,
        num_convs=2,
        num_classes=classes,
        norm_cfg=NORM,
        align_corners=align_corners,
    )
    return cfg


@torch.no_grad()
def initialise(model, seed=0, gain=0.7):
    """Statistics as training leaves them, and logits among which every class wins somewhere."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # Less than usual: the recursion of RecNeXt adds up, and float16 is to hold the sums.
            nn.init.kaiming_normal_(module.weight).mul_(gain)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.2, 0.2)
    randomise_norms(model, seed)
    model.eval()
    conv = model.decode_head.conv_seg
    logits = model(smooth_images(8, seed=99))
    spread, mean = torch.std_mean(logits, (0, 2, 3))
    conv.weight.div_(spread[:, None, None, None])
    conv.bias.sub_(mean).div_(spread)
    return model


def build(cfg, kind):
    return MODELS.build(ConfigDict(copy.deepcopy({**cfg, 'type': kind})))


def pair(cfg, seed=0):
    """mmseg's segmentor and ours with the same weights."""
    stock = initialise(build(cfg, 'EncoderDecoder'), seed)
    fast = build(cfg, 'FastEncoderDecoder').eval()
    fast.load_state_dict(stock.state_dict())
    return stock, fast


def smooth_images(number, size=SIZE, seed=0):
    """Normalised images with structure at several scales."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (torch.randn(number, 3, side, side, generator=generator) for side in (3, 8, 24))
    return sum(F.interpolate(part, size=size, mode='bicubic') for part in coarse)


def sample_of(size=SIZE, **metainfo):
    return SegDataSample(metainfo={**dict(img_shape=size, ori_shape=size, pad_shape=size), **metainfo})


# --- test_step ---


def raw_images(sizes, seed=0):
    """Images as a dataset gives them: uint8."""
    return [
        (60 * smooth_images(1, size, seed + index)[0] + 120).clamp(0, 255).to(torch.uint8)
        for index, size in enumerate(sizes)
    ]


@torch.no_grad()
def step(model, images, samples=None):
    data = dict(inputs=list(images))
    if samples is not None:
        data['data_samples'] = copy.deepcopy(samples)
    return model.test_step(data)


def deviation(value, reference):
    assert value.shape == reference.shape
    return ((value - reference).abs().max() / reference.abs().max()).item()


@torch.no_grad()
def head_logits(model, images):
    return model.forward_logits(images)
