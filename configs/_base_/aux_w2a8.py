# F at W2A8 with the full-precision auxiliary module
_base_ = ['./qat_w2a8.py', './guidance/aux.py']

quantization = dict(guidance=_base_.aux_guidance)
