# The usual learned scales of brevitas
_base_ = '../../configs/qat_r18_w2a2_tiny.py'
custom_imports = dict(imports=['benchmarks.peers.quantizers'])

model = dict(
    # a GPU could not record its step
    speed='eager',
    quantizers=dict(
        weight=dict(type='mmauxq.BrevitasLearned'),
        activation=dict(type='mmauxq.BrevitasLearned'),
    ),
)
