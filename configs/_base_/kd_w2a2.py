# F at W2A2 with a float teacher
_base_ = ['./qat_w2a2.py', './guidance/kd.py']

quantization = dict(guidance=_base_.kd_guidance)
