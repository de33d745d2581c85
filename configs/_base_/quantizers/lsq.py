# Learned steps: the quantizer that holds up best at 2 to 4 bits.
quantization = dict(
    type='mmauxq.JointQAT',
    quantizers=dict(
        weight=dict(type='mmauxq.LSQ'), activation=dict(type='mmauxq.LSQ')
    ),
    # 32 is floating point; 8 is the other usual choice
    policy=dict(first=32, last=32, layers=dict()),
)
