# F at W2A8 with the auxiliary module and a float teacher
_base_ = ['./qat_w2a8.py', './guidance/aux.py', './guidance/kd.py']

quantization = dict(guidance=[_base_.aux_guidance, _base_.kd_guidance])
