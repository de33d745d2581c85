# F at W8A8 with a float teacher
_base_ = ['./qat_w8a8.py', './guidance/kd.py']

quantization = dict(guidance=_base_.kd_guidance)
