# F at W2A2 with a classifier on each tapped output
_base_ = ['./qat_w2a2.py', './guidance/dsn.py']

quantization = dict(guidance=_base_.dsn_guidance)
