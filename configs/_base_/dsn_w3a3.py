# F at W3A3 with a classifier on each tapped output
_base_ = ['./qat_w3a3.py', './guidance/dsn.py']

quantization = dict(guidance=_base_.dsn_guidance)
