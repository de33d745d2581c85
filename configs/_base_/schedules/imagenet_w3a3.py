_base_ = './imagenet_w4a4.py'

optim_wrapper = dict(optimizer=dict(weight_decay=5e-5))
