# F at W2A8 with a classifier on each tapped output
_base_ = ['./qat_w2a8.py', './guidance/dsn.py']

quantization = dict(guidance=_base_.dsn_guidance)
