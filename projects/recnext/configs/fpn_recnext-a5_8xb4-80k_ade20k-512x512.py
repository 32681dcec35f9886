_base_ = [
    './_base_/models/fpn_recnext.py',
    './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_80k.py',
    './_base_/default_runtime.py',
]
model = dict(
    backbone=dict(
        arch='a5',
        init_cfg=dict(type='Pretrained', checkpoint='checkpoints/recnext_a5_distill_300e.pth'),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
