# F at W8A8 with its blocks inside of a float network
_base_ = ['./qat_w8a8.py', './guidance/bwr.py']

quantization = dict(guidance=_base_.bwr_guidance)
