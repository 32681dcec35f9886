_base_ = [
    './_base_/models/fpn_recnext.py',
    './_base_/datasets/sample_scenes.py',
    './_base_/schedules/schedule_80k.py',
    './_base_/default_runtime.py',
]
# From scratch, in minutes on two cores: a higher learning rate and a short warm-up.
model = dict(
    data_preprocessor=dict(size=(128, 128)),
    backbone=dict(arch='m0'),
    neck=dict(in_channels=[40, 80, 160, 320]),
)
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, begin=0, end=20, by_epoch=False),
    dict(type='PolyLR', power=0.9, eta_min=1e-6, begin=20, end=350, by_epoch=False),
]
train_cfg = dict(max_iters=350, val_interval=350)
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=350),
)
auto_scale_lr = dict(base_batch_size=4)
