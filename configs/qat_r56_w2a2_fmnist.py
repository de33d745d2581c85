_base_ = './qat_r20_w2a2_fmnist.py'

model = dict(architecture=dict(backbone=dict(depth=56)))
