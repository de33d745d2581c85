_base_ = './fmnist_r20.py'

model = dict(backbone=dict(depth=56))
