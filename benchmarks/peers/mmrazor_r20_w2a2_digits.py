# LSQ of mmrazor
_base_ = '../../configs/qat_r20_w2a2_digits.py'
custom_imports = dict(imports=['benchmarks.peers.quantizers'])

model = dict(
    # a GPU could not record its step
    speed='eager',
    quantizers=dict(
        weight=dict(type='mmauxq.MMRazorLSQ'),
        activation=dict(type='mmauxq.MMRazorLSQ'),
    ),
)
