# Quantization-aware training of F alone, W8A8
_base_ = './quantizers/lsq.py'

quantization = dict(
    quantizers=dict(weight=dict(bits=8), activation=dict(bits=8))
)
