"""Arms of one seed start alike, and building draws no random number."""

import random

import numpy as np
import pytest
import torch

from tests.networks import AUX, classifier, joint_qat

GUIDANCES = {
    'aux': AUX,
    'aux, separate norms': dict(AUX, separate_bn=True),
    'classifiers': dict(type='mmauxq.IntermediateClassifiers'),
    'teacher': dict(type='mmauxq.KnowledgeDistillation'),
    'trained teacher': dict(
        type='mmauxq.KnowledgeDistillation',
        teacher=classifier(base_channels=8),
        train_teacher=True,
    ),
    'blocks': dict(type='mmauxq.BlockReplacement'),
    'both': [AUX, dict(type='mmauxq.KnowledgeDistillation')],
}


def states():
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tobytes(), rest, torch.rand(3)


@pytest.mark.parametrize('guidance', GUIDANCES.values(), ids=GUIDANCES)
def test_f_starts_from_the_same_weights_whatever_guides_it(guidance):
    plain = joint_qat(seed=7, guidance=None)
    after = states()
    guided = joint_qat(seed=7, guidance=guidance)
    expected = plain.architecture.state_dict()
    for name, value in guided.architecture.state_dict().items():
        assert torch.equal(value, expected[name]), name
    for a, b in zip(states(), after, strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def test_the_seed_decides_how_the_guidance_starts():
    starts = [
        joint_qat(seed=seed).guidance.adaptors[0].phi[0].weight
        for seed in (1, 1, 2)
    ]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_the_layout_in_memory_does_not_count():
    expected = joint_qat(seed=7).state_dict()
    model = joint_qat(seed=7, channels_last=True)
    conv = model.architecture.backbone.layer2[0].conv2
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize('guidance', GUIDANCES.values(), ids=GUIDANCES)
def test_no_generator_of_a_gpu_is_seeded(guidance, monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeds.append)
    joint_qat(seed=7, guidance=guidance)
    assert seeds == [7]
