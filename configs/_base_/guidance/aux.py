aux_guidance = dict(
    type='mmauxq.AuxAdaptorAggregator',
    # the repeated blocks of the backbone
    taps='auto',
    # the paper's weight of the auxiliary loss
    loss_weight=1.0,
    # the paper's full-width adaptors
    width_ratio=1.0,
)
