# F at W4A16 with the full-precision auxiliary module
_base_ = ['./qat_w4a16.py', './guidance/aux.py']

quantization = dict(guidance=_base_.aux_guidance)
