"""What the export reads from a config."""

import copy

from torch import nn

from mmauxq.deploy.network import calibrated_network, guidance_cost


def test_cost_of_the_guidance(small_config):
    cost = guidance_cost(small_config)
    assert cost['type'] == 'mmauxq.AuxAdaptorAggregator'
    assert cost['parameters'] > 0 and cost['multiply_adds'] > 0
    cfg = copy.deepcopy(small_config)
    cfg.model.guidance = None
    assert guidance_cost(cfg) == dict(type=None, parameters=0, multiply_adds=0)


def test_cost_of_a_teacher_that_is_gone(small_config):
    cfg = copy.deepcopy(small_config)
    kd = dict(
        type='mmauxq.KnowledgeDistillation',
        teacher=copy.deepcopy(cfg.model.architecture),
        checkpoint='gone.pth',
    )
    cfg.model.guidance = [cfg.model.guidance, kd]
    assert guidance_cost(cfg) == dict(
        type='mmauxq.AuxAdaptorAggregator and mmauxq.KnowledgeDistillation',
        parameters=None,
        multiply_adds=None,
    )


def test_every_layer_of_a_generated_network_counts(small_config):
    """MMPretrain starts the last batch norm of a residual branch at zero."""
    assert 'zero_init_residual' not in small_config.model.architecture.backbone
    network = calibrated_network(small_config)
    norms = [
        module
        for module in network.architecture.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    assert len(norms) == 9
    assert all((norm.weight == 1).all() for norm in norms)
