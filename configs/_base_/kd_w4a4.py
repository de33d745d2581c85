# F at W4A4 with a float teacher
_base_ = ['./qat_w4a4.py', './guidance/kd.py']

quantization = dict(guidance=_base_.kd_guidance)
