from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.models.heads import LinearClsHead
from mmpretrain.structures import DataSample

from mmauxq.algorithms.head_loss import task_loss
from mmauxq.errors import UsageError
from mmauxq.guidance import IntermediateClassifiers, Tap
from tests.networks import batch, joint_qat

DSN = dict(type='mmauxq.IntermediateClassifiers')
TAPS = [
    Tap('a', (4, 8, 8)),
    Tap('b', (6, 5), 'tokens'),
    Tap('c', (3, 3, 7), 'channels_last'),
]


def head(**loss):
    return LinearClsHead(10, 8, loss=dict(type='CrossEntropyLoss', **loss))


def task(samples):
    return partial(task_loss, head(), samples)


def outputs():
    torch.manual_seed(1)
    return {t.name: torch.randn(3, *t.shape) for t in TAPS}


def test_each_loss_is_that_of_a_classifier_on_the_pooled_output():
    module = IntermediateClassifiers(
        TAPS, 10, loss_weight=0.5, alphas=[1.0, 2.0, 4.0]
    )
    given = outputs()
    pooled = dict(
        a=given['a'].mean((2, 3)),
        b=given['b'].mean(1),
        c=given['c'].mean((1, 2)),
    )
    samples = [DataSample().set_gt_label(i) for i in range(3)]
    losses = module.losses(module(given), None, None, task(samples))
    for i, (name, features) in enumerate(pooled.items()):
        logits = module.classifiers[i].fc(features)
        expected = 0.5 * 2.0**i * F.cross_entropy(logits, torch.arange(3))
        torch.testing.assert_close(losses[f'loss_{name}'], expected)


def test_in_the_seat_of_the_auxiliary_module():
    model = joint_qat(guidance=DSN)
    losses = model.loss(*batch())
    assert set(losses) == {
        'student.loss',
        *(f'guidance.loss_layer{i}.0' for i in (1, 2, 3)),
    }
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_guides_the_first_block_alone():
    """With one weight, only what comes before that tap learns from it."""
    model = joint_qat(guidance=dict(DSN, alphas=[1.0, 0.0, 0.0]))
    losses = model.loss(*batch())
    sum(v for k, v in losses.items() if 'guidance' in k).backward()
    backbone = model.architecture.backbone
    assert backbone.layer1[0].conv1.weight.grad.abs().sum() > 0
    assert not backbone.layer2[0].conv1.weight.grad.abs().sum()


def test_the_network_that_ships_is_the_same_as_without():
    guided = joint_qat(guidance=DSN)
    guided.loss(*batch())
    plain = joint_qat(guidance=None)
    plain.load_state_dict(guided.state_dict())
    inputs, _ = batch(seed=3)
    assert torch.equal(
        guided.eval()(inputs, mode='tensor'),
        plain.eval()(inputs, mode='tensor'),
    )


@pytest.mark.parametrize(
    'alphas, message',
    [
        ([1.0] * 4, 'expected 3 weights, .* got 4'),
        ([1.0], 'expected 3 weights, .* got 1'),
        ([1.0, -1.0, 0.0], 'expected a number from 0 or'),
        (-1.0, 'expected a number from 0 or'),
    ],
)
def test_wrong_weights(alphas, message):
    with pytest.raises(UsageError, match=f'^guidance.alphas.*{message}'):
        joint_qat(guidance=dict(DSN, alphas=alphas))


def test_all_weights_are_1_if_none_is_set():
    samples = [DataSample().set_gt_label(i) for i in range(3)]
    losses = []
    for settings in ({}, dict(loss_weight=1.0, alphas=[1.0] * len(TAPS))):
        torch.manual_seed(0)
        module = IntermediateClassifiers(TAPS, 10, **settings)
        losses.append(
            module.losses(module(outputs()), None, None, task(samples))
        )
    assert losses[0].keys() == losses[1].keys() and len(losses[0])
    for name, value in losses[0].items():
        assert torch.equal(value, losses[1][name])


@pytest.mark.parametrize(
    'dtype, expected', [('float32', torch.float32), (None, torch.bfloat16)]
)
def test_full_precision_under_autocast(dtype, expected):
    module = IntermediateClassifiers(TAPS, 10, dtype=dtype)
    with torch.autocast('cpu', torch.bfloat16):
        assert module(outputs()).dtype == expected
