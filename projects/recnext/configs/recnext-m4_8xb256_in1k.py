_base_ = [
    './_base_/models/recnext_classifier.py',
    './_base_/datasets/imagenet.py',
    './_base_/schedules/schedule_300e.py',
    './_base_/imagenet_runtime.py',
]
model = dict(backbone=dict(arch='m4', drop_path_rate=0.2), head=dict(in_channels=512))
