_base_ = [
    './_base_/models/recnext_classifier.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedules/schedule_300e.py',
    './_base_/imagenet_runtime.py',
]
# The pictures of `tools/make_sample_dataset.py --layout imagenet`: small, and used at their own size. From scratch, in
# minutes on two cores.
model = dict(
    backbone=dict(arch='m0'),
    head=dict(in_channels=320, num_classes=8, loss=dict(_delete_=True, type='CrossEntropyLoss')),
    train_cfg=None,
)
data_preprocessor = dict(num_classes=8)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataset = dict(
    _delete_=True, type='CustomDataset', data_root='data/sample-objects', data_prefix='train', pipeline=train_pipeline
)
val_dataset = dict(
    _delete_=True, type='CustomDataset', data_root='data/sample-objects', data_prefix='val', pipeline=test_pipeline
)
train_dataloader = dict(batch_size=32, num_workers=2, sampler=dict(type='DefaultSampler'), dataset=train_dataset)
val_dataloader = dict(batch_size=32, num_workers=2, dataset=val_dataset)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1, 5))
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, end=5, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=5, val_interval=1)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=1))
custom_hooks = [dict(type='ThroughputHook'), dict(type='AdaptiveClipHook', clip_factor=0.02)]
auto_scale_lr = dict(base_batch_size=32)
