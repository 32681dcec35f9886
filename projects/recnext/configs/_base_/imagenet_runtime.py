_base_ = ['./default_runtime.py']
custom_imports = dict(imports=['projects.recnext.recnext.openmmlab.classifier'], allow_failed_imports=False)
default_scope = 'mmpretrain'
# The released ImageNet networks were trained with the norm statistics of each GPU.
sync_bn = None
visualizer = dict(type='UniversalVisualizer')
log_processor = dict(by_epoch=True)
# Adaptive clipping and averaged weights belong to the recipe as well.
custom_hooks = [
    dict(type='ThroughputHook'),
    dict(type='AdaptiveClipHook', clip_factor=0.02),
    dict(type='EMAHook', momentum=4e-5, update_buffers=True),
]
