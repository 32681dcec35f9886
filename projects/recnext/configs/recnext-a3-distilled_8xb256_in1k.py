_base_ = ['./recnext-a3_8xb256_in1k.py']
# The teacher of the released networks; from the hub, where no checkpoint is named.
model = dict(distillation=dict(model='regnety_160.deit_in1k', checkpoint=None, alpha=0.5))
