# F at W3A3 with its blocks inside of a float network
_base_ = ['./qat_w3a3.py', './guidance/bwr.py']

quantization = dict(guidance=_base_.bwr_guidance)
