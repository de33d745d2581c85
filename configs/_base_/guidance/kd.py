kd_guidance = dict(
    type='mmauxq.KnowledgeDistillation',
    # F's own architecture in floating point ...
    teacher=None,
    # ... with the weights that F starts from
    checkpoint=None,
    # temperature and weight of the LSQ paper; a far higher temperature is
    # known to hurt low-bit students
    logits=dict(type='mmrazor.KLDivergence', tau=1.0, loss_weight=1.0),
    loss_weight=1.0,
)
