custom_imports = dict(imports=['projects.recnext.recnext.openmmlab'], allow_failed_imports=False)
default_scope = 'mmseg'
custom_hooks = [dict(type='ThroughputHook')]
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
# Plain BN in the model; on several GPUs the Runner makes it SyncBN.
sync_bn = 'torch'
randomness = dict(seed=0)
visualizer = dict(type='SegPanelVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
