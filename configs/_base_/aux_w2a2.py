# F at W2A2 with the full-precision auxiliary module
_base_ = ['./qat_w2a2.py', './guidance/aux.py']

quantization = dict(guidance=_base_.aux_guidance)
