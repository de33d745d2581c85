# The best that docs/map.md has for a deep network from a float start
_base_ = [
    './_base_/networks/fmnist_r56.py',
    './_base_/auxkd_w2a2.py',
    './_base_/schedules/fmnist_qat.py',
]

kd_guidance = dict(
    _base_.kd_guidance, logits=dict(_base_.kd_guidance.logits, tau=4.0)
)
model = dict(
    _delete_=True,
    architecture=_base_.model,
    input_shape=_base_.input_shape,
    **dict(_base_.quantization, guidance=[_base_.aux_guidance, kd_guidance]),
)
