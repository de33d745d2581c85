# F at W4A16 with a float teacher
_base_ = ['./qat_w4a16.py', './guidance/kd.py']

quantization = dict(guidance=_base_.kd_guidance)
