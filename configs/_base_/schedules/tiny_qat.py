# From a float start
optim_wrapper = dict(
    # bfloat16 where the GPU computes it natively
    type='mmauxq.AutoAmpOptimWrapper',
    optimizer=dict(
        type='SGD', lr=0.04, momentum=0.9, nesterov=True, weight_decay=1e-4
    ),
)
param_scheduler = dict(
    type='CosineAnnealingLR', T_max=16, convert_to_iter_based=True
)
train_cfg = dict(by_epoch=True, max_epochs=16, val_interval=1)
val_cfg = dict()
test_cfg = dict()
