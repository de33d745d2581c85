# Small enough that bash tools/quickstart.sh trains nine of them in a minute
_base_ = './digits_r20.py'

model = dict(
    backbone=dict(
        depth=8,
        # three blocks need no help to start, and learn in half the epochs
        zero_init_residual=False,
    )
)
# The same digits and crops; a batch is one gather instead of 64 pipelines,
# which saves a third of a training step on a CPU
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmauxq.InMemoryImages',
        dataset=dict(type='mmauxq.Digits', split='train'),
        padding=1,
    ),
    collate_fn=dict(type='mmauxq.collated'),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='mmauxq.InMemoryImages',
        dataset=dict(type='mmauxq.Digits', split='test'),
    ),
    collate_fn=dict(type='mmauxq.collated'),
)
test_dataloader = val_dataloader
# A checkpoint takes as long as ten steps
default_hooks = dict(
    checkpoint=dict(
        interval=-1, save_last=True, save_best=None, max_keep_ckpts=2
    )
)
