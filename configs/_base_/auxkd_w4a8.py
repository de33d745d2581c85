# F at W4A8 with the auxiliary module and a float teacher
_base_ = ['./qat_w4a8.py', './guidance/aux.py', './guidance/kd.py']

quantization = dict(guidance=[_base_.aux_guidance, _base_.kd_guidance])
