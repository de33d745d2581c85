_base_ = [
    './_base_/networks/fmnist_r20.py',
    './_base_/schedules/fmnist_float.py',
]
