_base_ = ['./_base_/networks/imagenet_convnextt.py', './_base_/aux_w4a4.py']

model = dict(
    _delete_=True,
    architecture=_base_.model,
    float_checkpoint=_base_.float_checkpoint,
    **_base_.quantization,
)
