_base_ = [
    './_base_/networks/fmnist_r20.py',
    './_base_/qat_w2a8.py',
    './_base_/schedules/fmnist_qat.py',
]

model = dict(
    _delete_=True,
    architecture=_base_.model,
    input_shape=_base_.input_shape,
    **_base_.quantization,
)
