# F at W4A16 with the auxiliary module and a float teacher
_base_ = ['./qat_w4a16.py', './guidance/aux.py', './guidance/kd.py']

quantization = dict(guidance=[_base_.aux_guidance, _base_.kd_guidance])
