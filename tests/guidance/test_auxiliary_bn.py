"""The auxiliary module on a pass of its own, with its own batch norms."""

import copy

import pytest
import torch

from mmauxq.errors import UsageError
from mmauxq.guidance import TapRecorder
from mmauxq.guidance.auxiliary_bn import AuxiliaryBN
from tests.networks import AUX, batch, joint_qat

OWN = dict(AUX, separate_bn=True)
KD = dict(
    type='mmauxq.KnowledgeDistillation',
    features=dict(type='mmrazor.ATLoss', loss_weight=100.0),
    dtype=None,
)


def step(model, seed=0):
    """Losses of a step; gradients are in the parameters."""
    model.zero_grad()
    losses = model.loss(*batch(seed=seed))
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    return losses


def test_the_first_step_is_that_with_shared_norms():
    """As long as the norms are equal, only their gradients part."""
    shared, own = joint_qat(), joint_qat(guidance=OWN)
    expected, found = step(shared), step(own)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss)
    grads = {n: p.grad for n, p in own.named_parameters()}
    twins = own.guidance.second_pass
    for name, norm in zip(twins.names, twins.norms, strict=True):
        for key in ('weight', 'bias'):
            one = grads[f'architecture.backbone.{name}.{key}']
            one.add_(getattr(norm, key).grad)
            assert getattr(norm, key).grad.abs().sum() > 0
    for name, parameter in shared.named_parameters():
        torch.testing.assert_close(
            grads[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name
        )


def test_they_start_as_those_of_f_and_go_their_own_way():
    model = joint_qat(guidance=OWN)
    norm = model.architecture.backbone.bn1
    with torch.no_grad():  # as a float checkpoint does, after the building
        norm.weight.fill_(3.0)
        norm.running_mean.fill_(0.5)
    second = model.guidance.second_pass
    twin = second.norms[second.names.index('bn1')]
    assert twin.weight.tolist() == [1.0] * 4
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model)
    torch.testing.assert_close(twin.weight, norm.weight)
    torch.testing.assert_close(twin.running_mean, norm.running_mean)
    assert twin.num_batches_tracked == norm.num_batches_tracked == 1
    optimizer.step()
    assert not torch.equal(twin.weight, norm.weight)
    with torch.no_grad():
        twin.weight.mul_(-2)
    later = second.names.index('layer1.0.bn2')
    before = model.architecture.backbone.layer1[0].bn2.running_mean.clone()
    step(model, seed=1)
    theirs = model.architecture.backbone.layer1[0].bn2.running_mean
    assert not torch.equal(theirs, before)
    assert not torch.allclose(second.norms[later].running_mean, theirs)


def test_all_is_read_in_the_second_pass():
    """The stem, too."""
    model = joint_qat(guidance=OWN)
    step(model)
    inputs, second = batch()[0], model.guidance.second_pass
    with torch.no_grad():
        for norm in second.norms:
            norm.bias.add_(1.0)
        with model.recording():
            model.student(inputs)
            first = second.recorder.outputs()
            found = second(inputs)
    assert list(found) == list(first) and 'stem' in found
    for name, tensor in found.items():
        assert not torch.allclose(tensor, first[name]), name


def test_a_resumed_run_keeps_them():
    model = joint_qat(guidance=OWN)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(2):
        step(model, seed)
        optimizer.step()
    again = joint_qat(1, guidance=OWN)
    again.load_state_dict(model.state_dict())
    for name, loss in step(model, 5).items():
        assert torch.equal(step(again, 5)[name], loss), name


def test_f_alone_predicts_and_ships():
    model = joint_qat(guidance=OWN)
    step(model)
    inputs, _ = batch(seed=2)
    expected = model.eval()(inputs, mode='tensor')
    keys = [k for k in model.state_dict() if k.startswith('guidance.second_')]
    assert len(keys) == 1 + 5 * len(model.guidance.second_pass.names)
    alone = joint_qat(guidance=None)
    alone.load_state_dict(model.state_dict())
    assert torch.equal(alone.eval()(inputs, mode='tensor'), expected)


def test_a_copy_runs_the_copied_network():
    """As for an average of the weights."""
    model = joint_qat(guidance=OWN)
    step(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.architecture.parameters():
            parameter.zero_()
    assert step(other)['guidance.loss_aux'] != step(model)['guidance.loss_aux']
    assert other.guidance.second_pass._network[0] is other.architecture


@pytest.mark.parametrize('order', [1, -1])
def test_other_guidances_read_the_pass_of_f(order):
    """Whatever runs in between: here with statistics far from F's."""
    features = {}
    for aux in (AUX, OWN):
        model = joint_qat(guidance=[aux, KD][::order])
        step(model)
        own = model.guidances[::order][0]
        if own.separate_bn:
            with torch.no_grad():
                for norm in own.second_pass.norms:
                    norm.weight.mul_(-2)
        losses = step(model)
        features[own.separate_bn] = {
            k: v for k, v in losses.items() if 'layer' in k or 'logits' in k
        }
        assert len(features[own.separate_bn]) == 4
    for name, loss in features[False].items():
        torch.testing.assert_close(features[True][name], loss)


@pytest.mark.parametrize('memory', ['codes', 'recompute'])
def test_less_memory_is_the_same_step(memory):
    found = []
    for how in (None, memory):
        model = joint_qat(guidance=OWN, memory=how)
        for seed in range(2):
            losses = step(model, seed)
        found.append((losses, [p.grad for p in model.parameters()]))
    for name, loss in found[0][0].items():
        assert torch.equal(found[1][0][name], loss), name
    for mine, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(mine, other)


def test_it_costs_a_second_pass():
    shared, own = joint_qat().cost, joint_qat(guidance=OWN).cost
    norms = sum(
        p.numel()
        for m in joint_qat().architecture.modules()
        if isinstance(m, torch.nn.BatchNorm2d)
        for p in m.parameters()
    )
    assert own.guidance_parameters == shared.guidance_parameters + norms
    head = 16 * 10
    assert own.guidance_multiply_adds == (
        shared.guidance_multiply_adds + shared.multiply_adds - head
    )


def test_what_cannot_run_twice_is_one_line():
    vit = dict(
        type='ImageClassifier',
        backbone=dict(
            type='VisionTransformer', arch='deit-tiny', img_size=32,
            patch_size=16,
        ),
        head=dict(
            type='LinearClsHead', num_classes=10, in_channels=192,
            loss=dict(type='CrossEntropyLoss'),
        ),
    )  # fmt: skip
    with pytest.raises(UsageError, match='batch norms, got a Vision'):
        joint_qat(guidance=OWN, architecture=vit, input_shape=(3, 32, 32))
    network = joint_qat().architecture
    with pytest.raises(UsageError, match=r"the backbone, got \['neck'\]"):
        AuxiliaryBN(network, TapRecorder(network, ['neck', 'backbone.bn1']))
