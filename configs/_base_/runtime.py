_base_ = 'mmpretrain::_base_/default_runtime.py'

default_hooks = dict(
    checkpoint=dict(interval=1, max_keep_ckpts=2, save_best='accuracy/top1')
)
# Without it every rank evaluates with batch-norm statistics of its own, and
# the checkpoint has those of rank 0.
custom_hooks = [dict(type='SyncBuffersHook')]
