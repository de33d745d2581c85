# F at W4A8 with the full-precision auxiliary module
_base_ = ['./qat_w4a8.py', './guidance/aux.py']

quantization = dict(guidance=_base_.aux_guidance)
