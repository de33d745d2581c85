# F at W3A3 with the full-precision auxiliary module
_base_ = ['./qat_w3a3.py', './guidance/aux.py']

quantization = dict(guidance=_base_.aux_guidance)
