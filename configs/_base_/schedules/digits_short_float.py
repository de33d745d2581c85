_base_ = './digits_float.py'

optim_wrapper = dict(optimizer=dict(lr=0.2))
param_scheduler = dict(T_max=10)
train_cfg = dict(max_epochs=10)
