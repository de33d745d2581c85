_base_ = [
    './_base_/networks/digits_r20.py',
    './_base_/bwr_w2a2.py',
    './_base_/schedules/digits_w2a2.py',
]

model = dict(
    _delete_=True,
    architecture=_base_.model,
    input_shape=_base_.input_shape,
    **_base_.quantization,
)
