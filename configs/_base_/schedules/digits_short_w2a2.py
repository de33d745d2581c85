# Of 0.02, 0.05, 0.1 and 0.2 the learning rate that was best for plain W2A2
# from the float network, on two seeds that no table shows (10 and 11)
_base_ = './digits_float.py'

optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = dict(T_max=5)
train_cfg = dict(max_epochs=5)
