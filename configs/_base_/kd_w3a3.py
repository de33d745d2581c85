# F at W3A3 with a float teacher
_base_ = ['./qat_w3a3.py', './guidance/kd.py']

quantization = dict(guidance=_base_.kd_guidance)
