optim_wrapper = dict(
    # bfloat16 where the GPU computes it natively
    type='mmauxq.AutoAmpOptimWrapper',
    optimizer=dict(
        type='SGD', lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4
    ),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', begin=1, T_max=23, convert_to_iter_based=True
    ),
]
train_cfg = dict(by_epoch=True, max_epochs=24, val_interval=1)
val_cfg = dict()
test_cfg = dict()
