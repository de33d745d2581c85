# F at W4A8 with a float teacher
_base_ = ['./qat_w4a8.py', './guidance/kd.py']

quantization = dict(guidance=_base_.kd_guidance)
