_base_ = [
    './_base_/networks/cifar10_r20.py',
    './_base_/aux_w2a2.py',
    './_base_/schedules/cifar10_qat.py',
]

model = dict(
    _delete_=True,
    architecture=_base_.model,
    input_shape=_base_.input_shape,
    **_base_.quantization,
)
