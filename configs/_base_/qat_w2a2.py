# Quantization-aware training of F alone, W2A2
_base_ = './quantizers/lsq.py'

quantization = dict(
    quantizers=dict(weight=dict(bits=2), activation=dict(bits=2))
)
