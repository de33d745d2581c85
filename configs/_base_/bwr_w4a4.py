# F at W4A4 with its blocks inside of a float network
_base_ = ['./qat_w4a4.py', './guidance/bwr.py']

quantization = dict(guidance=_base_.bwr_guidance)
