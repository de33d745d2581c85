# Esser et al., arXiv:1902.08153: 90 epochs from a float network, cosine decay
# from 0.01, batch 256; the weight decay shrinks with the bits.
optim_wrapper = dict(
    # bfloat16 where the GPU computes it natively
    type='mmauxq.AutoAmpOptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4),
)
param_scheduler = dict(
    type='CosineAnnealingLR',
    T_max=90,
    by_epoch=True,
    convert_to_iter_based=True,
)
train_cfg = dict(by_epoch=True, max_epochs=90, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=256)
