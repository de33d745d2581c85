"""What the export reads from a config."""

import copy

from mmauxq.deploy.network import guidance_cost


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
