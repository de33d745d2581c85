_base_ = [
    './_base_/networks/tiny_r18.py',
    './_base_/schedules/tiny_float.py',
]
