_base_ = './float_r20_fmnist.py'

model = dict(backbone=dict(depth=56))
