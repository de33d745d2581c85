_base_ = [
    './_base_/networks/cifar10_r20.py',
    './_base_/schedules/cifar10_float.py',
]
