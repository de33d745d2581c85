# F at W2A2 with its blocks inside of a float network
_base_ = ['./qat_w2a2.py', './guidance/bwr.py']

quantization = dict(guidance=_base_.bwr_guidance)
