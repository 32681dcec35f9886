_base_ = [
    './_base_/models/fpn_recnext.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_80k.py',
    './_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='m3',
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/recnext_m3_distill_300e.pth'),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
