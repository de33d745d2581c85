# Quantization-aware training of F alone, W3A3
_base_ = './quantizers/lsq.py'

quantization = dict(
    quantizers=dict(weight=dict(bits=3), activation=dict(bits=3))
)
