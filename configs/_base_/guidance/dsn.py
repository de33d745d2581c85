dsn_guidance = dict(
    type='mmauxq.IntermediateClassifiers',
    # the repeated blocks of the backbone
    taps='auto',
    # one weight for all classifiers, or a list
    alphas=1.0,
    loss_weight=1.0,
)
