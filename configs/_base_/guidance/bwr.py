bwr_guidance = dict(
    type='mmauxq.BlockReplacement',
    # each tap costs a pass through the rest of the float network
    taps='stage_ends',
    # the float network, `teacher`, `checkpoint` and `logits` are as in kd.py
    logits=dict(type='mmrazor.KLDivergence', tau=1.0, loss_weight=1.0),
    loss_weight=1.0,
)
