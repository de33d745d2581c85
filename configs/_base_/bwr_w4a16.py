# F at W4A16 with its blocks inside of a float network
_base_ = ['./qat_w4a16.py', './guidance/bwr.py']

quantization = dict(guidance=_base_.bwr_guidance)
