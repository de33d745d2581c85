# From a float start; the weight decay of 2-bit networks, as on ImageNet
optim_wrapper = dict(optimizer=dict(type='Adam', lr=1e-3, weight_decay=2.5e-5))
param_scheduler = dict(
    type='CosineAnnealingLR', T_max=20, convert_to_iter_based=True
)
train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
val_cfg = dict()
test_cfg = dict()
