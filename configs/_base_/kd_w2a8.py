# F at W2A8 with a float teacher
_base_ = ['./qat_w2a8.py', './guidance/kd.py']

quantization = dict(guidance=_base_.kd_guidance)
