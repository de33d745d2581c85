_base_ = [
    './_base_/networks/digits_r8.py',
    './_base_/schedules/digits_short_float.py',
]
