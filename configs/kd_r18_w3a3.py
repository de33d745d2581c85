_base_ = [
    './_base_/networks/imagenet_r18.py',
    './_base_/kd_w3a3.py',
    './_base_/schedules/imagenet_w3a3.py',
]

model = dict(
    _delete_=True,
    architecture=_base_.model,
    float_checkpoint=_base_.float_checkpoint,
    **_base_.quantization,
)
