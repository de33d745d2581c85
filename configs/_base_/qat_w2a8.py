# Quantization-aware training of F alone, W2A8
_base_ = './quantizers/lsq.py'

quantization = dict(
    quantizers=dict(weight=dict(bits=2), activation=dict(bits=8))
)
