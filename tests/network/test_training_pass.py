"""What modules take and return, from one pass with gradients."""

import copy

import pytest
import torch
from mmpretrain.registry import MODELS
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmauxq.network import TrainingPass
from tests.networks import SHAPE, Overwriting, classifier

BLOCKS = [f'backbone.layer{i}.0' for i in (1, 2, 3)]


def images(count=2):
    return torch.randn(count, *SHAPE)


def network(**backbone):
    return MODELS.build(classifier(**backbone))


class Classifier(nn.Module):
    """Any backbone, in the place of one of mmpretrain."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, mode='tensor'):
        return self.backbone(x)


def test_calls_are_in_the_order_in_which_modules_return():
    run = TrainingPass(network(), images())
    names = list(run.calls)
    assert names.index('backbone.conv1') < names.index('backbone.layer1.0')
    assert names.index('backbone.layer1.0.bn2') < names.index(
        'backbone.layer1.0'
    )
    assert names[-1] == ''  # the network itself


def test_shapes_and_kinds_of_what_is_returned():
    run = TrainingPass(network(), images(3))
    shapes = [tuple(run.calls[name].outputs[0].shape) for name in BLOCKS]
    assert shapes == [(3, 4, 8, 8), (3, 8, 4, 4), (3, 16, 2, 2)]
    assert run.calls[BLOCKS[0]].kind == 'Tensor'
    assert run.calls['backbone'].kind == 'tuple'
    assert run.features('backbone') == (0,)


def test_gradients_lead_back_to_every_block():
    run = TrainingPass(network(), images())
    assert all(run.calls[name].grad for name in BLOCKS)
    assert all(map(run.is_usable, BLOCKS))
    assert not run.is_usable('head')  # logits are no feature map
    assert not run.is_usable('backbone.none')


def test_also_in_a_frozen_backbone():
    """Its learned scales will send one."""
    frozen = network()
    frozen.backbone.requires_grad_(False)
    run = TrainingPass(frozen, images())
    assert all(map(run.is_usable, BLOCKS))


def test_what_runs_inside_checkpointing_sends_none():
    model = network(with_cp=True)
    run = TrainingPass(model, images())
    assert run.is_usable('backbone.layer1.0')
    assert not run.calls['backbone.layer1.0.conv1'].grad
    assert not run.is_usable('backbone.layer1.0.conv1')


def test_what_a_later_operation_overwrites():
    run = TrainingPass(Classifier(Overwriting()), images())
    for name, overwritten in (('first', True), ('second', False)):
        call = run.calls[f'backbone.{name}']
        changed = call.outputs[0]._version != call.versions[0]
        assert changed is overwritten


def test_the_first_inputs_of_a_module_are_kept():
    """By argument, also those that are given by name."""

    class Named(nn.Module):
        def forward(self, x, others=()):
            return x + sum(others)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.named = Named()

        def forward(self, x):
            y = self.named(x=x, others=[x * 2, x * 3])
            return self.named(y)

    given = images()
    run = TrainingPass(Classifier(Outer()), given)
    arguments, versions = run.first_inputs['backbone.named']
    assert [len(tensors) for tensors in arguments] == [1, 2]
    assert arguments[0][0] is run.images
    assert torch.equal(arguments[1][1], given * 3)
    assert versions == [0, 0, 0]
    # the last call
    last = run.calls['backbone.named'].inputs
    torch.testing.assert_close(last[0], given * 6)
    assert len(last) == 1


def test_chains_take_what_the_one_before_returned():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(1, 1, 1) for _ in 'abc')

        def forward(self, x):
            return self.c(self.b(x)) + self.a(x)

    run = TrainingPass(Classifier(Parallel()), images())
    assert run.are_chained(['backbone.b', 'backbone.c'])
    assert not run.are_chained(['backbone.a', 'backbone.b'])
    assert not run.are_chained(['backbone.b', 'backbone.none'])


@pytest.mark.parametrize(
    'tensor, expected',
    [
        (torch.ones(2, 3, 4, 4), True),
        (torch.ones(2, 5), True),
        (torch.ones(2), False),
        (torch.ones(3, 5), False),  # not one row for each image
        (torch.ones(2, 5).long(), False),
    ],
)
def test_features_have_a_row_for_each_image(tensor, expected):
    run = TrainingPass(network(), images(2))
    assert run.is_feature(tensor) is expected


def test_of_several_outputs_the_features_are_counted():
    class Several(nn.Module):
        def forward(self, x):
            return [x * 2, (torch.ones(7), x.flatten(1))]

    run = TrainingPass(Classifier(Several()), images())
    assert run.features('backbone') == (0, 2)
    assert run.calls['backbone'].kind == 'list'


def test_the_network_is_left_as_it_was():
    model = network()
    model.backbone.layer1.eval()  # as a frozen stage
    modes = [m.training for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    numbers, given = torch.get_rng_state(), images()
    before = torch.get_rng_state()
    TrainingPass(model, given)
    assert not torch.equal(numbers, before)
    assert torch.equal(torch.get_rng_state(), before)
    assert not given.requires_grad
    assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(p.grad is None for p in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_pass_that_fails_leaves_no_hook():
    model = network()
    with pytest.raises(RuntimeError):
        TrainingPass(model, torch.randn(2, 3, 8, 8))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_it_is_a_pass_of_training():
    """Stochastic depth is active, batch norms are not."""
    seen = {}

    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x):
            seen.update(block=self.training, norm=self.norm.training)
            return checkpoint(self.norm, x, use_reentrant=False)

    TrainingPass(Classifier(Modes()), images())
    assert seen == dict(block=True, norm=False)
