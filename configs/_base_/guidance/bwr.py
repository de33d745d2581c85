bwr_guidance = dict(
    type='mmauxq.BlockReplacement',
    # each tap costs a pass through the rest of the float network
    taps='stage_ends',
    # F's own architecture in floating point ...
    teacher=None,
    # ... with the weights that F starts from
    checkpoint=None,
    # as in kd.py
    logits=dict(type='mmrazor.KLDivergence', tau=1.0, loss_weight=1.0),
    loss_weight=1.0,
)
