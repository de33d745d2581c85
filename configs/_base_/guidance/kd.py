kd_guidance = dict(
    type='mmauxq.KnowledgeDistillation',
    # The teacher is F in floating point, with the weights that F starts from;
    # `teacher` and `checkpoint` name another. Temperature and weight are those
    # of the LSQ paper; docs/guidance.md says where a higher temperature
    # gained, and where it hurt.
    logits=dict(type='mmrazor.KLDivergence', tau=1.0, loss_weight=1.0),
    loss_weight=1.0,
)
