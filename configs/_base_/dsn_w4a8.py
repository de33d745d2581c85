# F at W4A8 with a classifier on each tapped output
_base_ = ['./qat_w4a8.py', './guidance/dsn.py']

quantization = dict(guidance=_base_.dsn_guidance)
