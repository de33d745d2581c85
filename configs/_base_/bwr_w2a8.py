# F at W2A8 with its blocks inside of a float network
_base_ = ['./qat_w2a8.py', './guidance/bwr.py']

quantization = dict(guidance=_base_.bwr_guidance)
