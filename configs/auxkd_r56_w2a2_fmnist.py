# The best that docs/map.md has for a deep network from a float start
_base_ = './auxkd_r20_w2a2_fmnist.py'

kd_guidance = dict(
    _base_.kd_guidance, logits=dict(_base_.kd_guidance.logits, tau=4.0)
)
model = dict(
    architecture=dict(backbone=dict(depth=56)),
    guidance=[_base_.aux_guidance, kd_guidance],
)
