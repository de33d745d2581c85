_base_ = [
    './_base_/networks/digits_r20.py',
    './_base_/schedules/digits_float.py',
]
