# F at W4A16 with a classifier on each tapped output
_base_ = ['./qat_w4a16.py', './guidance/dsn.py']

quantization = dict(guidance=_base_.dsn_guidance)
