# The same budget for every network that starts at 2 bits
_base_ = './digits_float.py'

optim_wrapper = dict(optimizer=dict(lr=0.1))
param_scheduler = dict(T_max=20)
train_cfg = dict(max_epochs=20)
