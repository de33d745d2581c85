# Twice the width: the teacher of kd_r18_w2a2_tiny_wide_teacher.py
_base_ = './float_r18_tiny.py'

model = dict(
    backbone=dict(base_channels=128, stem_channels=128),
    head=dict(in_channels=1024),
)
