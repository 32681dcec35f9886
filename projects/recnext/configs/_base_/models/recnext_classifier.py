# The ImageNet networks in MMPretrain. The leaves change arch, channels and the rest.
model = dict(
    _scope_='mmpretrain',
    type='RecNeXtClassifier',
    backbone=dict(type='RecNeXt', arch='m3', out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='RecNeXtClsHead',
        num_classes=1000,
        in_channels=512,
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
