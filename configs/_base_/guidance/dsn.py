dsn_guidance = dict(
    type='mmauxq.IntermediateClassifiers',
    # the repeated blocks of the backbone
    taps='auto',
    # one weight for all classifiers, or a list
    alphas=1.0,
    # nine classifiers of weight 1 took 1.8 points from a ResNet-20 that began
    # with a trained float network (docs/map.md); 0.1 did no harm
    loss_weight=0.1,
)
