# Quantization-aware training of F alone, W4A16
_base_ = './quantizers/lsq.py'

quantization = dict(
    quantizers=dict(weight=dict(bits=4), activation=dict(bits=16))
)
