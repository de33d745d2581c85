_base_ = [
    './_base_/networks/tiny_r18.py',
    './_base_/bwr_w2a2.py',
    './_base_/schedules/tiny_qat.py',
]

model = dict(
    _delete_=True,
    architecture=_base_.model,
    input_shape=_base_.input_shape,
    **_base_.quantization,
)
