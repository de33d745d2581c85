_base_ = [
    './_base_/networks/fmnist_r56.py',
    './_base_/schedules/fmnist_float.py',
]
