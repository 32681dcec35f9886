_base_ = ['./recnext-m4_8xb256_in1k.py']
# The teacher of the released networks; from the hub, where no checkpoint is named.
model = dict(
    backbone=dict(drop_path_rate=0.0), distillation=dict(model='regnety_160.deit_in1k', checkpoint=None, alpha=0.5)
)
