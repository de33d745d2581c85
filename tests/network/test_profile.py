"""What one pass tells of an architecture."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmpretrain.registry import MODELS
from torch import nn

from mmauxq.errors import UsageError
from mmauxq.layers import restore
from mmauxq.network import profile
from mmauxq.network.profile import (
    LayerTracer,
    floating,
    logits_in,
    unreached_layers,
)
from mmauxq.quantizers import named_quantizers
from tests.layers.test_weight_uses import Reader, SelfAttention, trace
from tests.networks import SHAPE, batch, classifier, joint_qat


@pytest.fixture
def x():
    return torch.randn(2, 3, 4)


def classifier_of(body, width):
    """As small as one can be: images to logits."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Sequential(nn.Flatten(), body))
            self.head = nn.Linear(width, 3)

        def forward(self, x, mode='tensor'):
            return self.head(self.backbone(x))

    return Network()


# --- how weights are used ---------------------------------------------------


def test_a_weight_of_two_uses_is_left_alone():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.fc(x), self.fc.weight)

    uses = profile(classifier_of(Both(), 4), (1, 2, 2)).layers
    assert uses['backbone.0.1.fc'].reason == (
        'both it and backbone.0.1 multiply by it'
    )


def test_samples_along_another_axis_are_counted():
    """Tokens first, as torch's attention has them by default."""
    model = SelfAttention()
    tracer = LayerTracer(model, batch=2)
    with tracer.following():
        model(torch.randn(5, 2, 8))
    uses = tracer.layers
    assert uses['attn'].sample_size == 5 * 8
    # which the quantized attention gives tokens last
    assert uses['attn.out_proj'].sample_size is None


def test_samples_along_axis_0_need_no_count(x):
    uses = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Reader()), x)
    assert {use.sample_size for use in uses.values()} == {None}


def test_no_hook_stays_behind_a_trace(x):
    model = Reader()
    with pytest.raises(RuntimeError):
        trace(model, torch.randn(2, 3))
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


# --- the profile -------------------------------------------------------------


def test_what_is_said_of_a_residual_network():
    found = profile(MODELS.build(classifier()), SHAPE)
    assert found.shape == SHAPE
    assert tuple(found.images.shape) == (1, *SHAPE)
    assert found.num_classes == 10
    assert found.unused == []
    names = list(found.layers)
    assert (names[0], names[-1]) == ('backbone.conv1', 'head.fc')
    assert len(names) == 10
    assert all(use.called and not use.reason for use in found.layers.values())
    network = MODELS.build(classifier())
    assert found.parameters == sum(p.numel() for p in network.parameters())


def test_multiply_adds_by_hand():
    network = classifier_of(nn.Linear(4, 5), 5)
    assert profile(network, (1, 2, 2)).multiply_adds == 4 * 5 + 5 * 3


def test_multiply_adds_are_those_of_one_image():
    """Also of a network that takes no single one."""

    class Squeezing(nn.Module):
        def forward(self, x):
            return x.squeeze()

    network = classifier_of(nn.Sequential(nn.Linear(4, 5), Squeezing()), 5)
    found = profile(network, (1, 2, 2))
    assert len(found.images) == 2
    assert found.multiply_adds == 4 * 5 + 5 * 3


def test_shared_parameters_count_once():
    layer = nn.Linear(4, 4)
    network = classifier_of(nn.Sequential(layer, layer), 4)
    assert profile(network, (1, 2, 2)).parameters == 20 + 15


def test_layers_that_do_not_run_are_named():
    network = MODELS.build(classifier())
    network.backbone.idle = nn.Conv2d(1, 1, 1)
    assert profile(network, SHAPE).unused == ['backbone.idle']


@pytest.mark.parametrize('declared', [16, (16, 16)])
def test_the_size_that_a_backbone_declares(declared):
    network = MODELS.build(classifier())
    network.backbone.img_size = declared
    assert profile(network).shape == (1, 16, 16)


def test_without_a_declared_size_it_is_the_first_that_runs(monkeypatch):
    network = MODELS.build(classifier())
    sizes = []
    forward = type(network.backbone).forward

    def only_32(self, x):
        sizes.append(x.shape[-1])
        if x.shape[-1] != 32:
            raise RuntimeError('not of this size')
        return forward(self, x)

    monkeypatch.setattr(type(network.backbone), 'forward', only_32)
    assert profile(network).shape == (1, 32, 32)
    assert sizes == [224, 224, 32]  # one image, two, one


def test_a_network_that_never_runs_says_why():
    network = MODELS.build(classifier())
    network.backbone.conv1 = nn.Conv2d(3, 4, 3)
    network.backbone.img_size = 8
    network.backbone.layer1 = nn.Linear(5, 5)
    with pytest.raises(UsageError) as error:
        profile(network)
    message = str(error.value)
    assert message.startswith(
        'architecture: a forward pass on (1, 3, 8, 8) fails ('
    )
    assert message.endswith(
        '); set model.input_shape to the (C, H, W) of the images that it is '
        'trained on'
    )
    assert '\n' not in message


def test_a_network_without_logits_is_refused():
    network = classifier_of(nn.Unflatten(1, (2, 2)), 2)
    with pytest.raises(UsageError) as error:
        profile(network, (1, 2, 2))
    assert str(error.value) == (
        'architecture: expected an image classifier whose forward pass gives '
        'logits (N, K)'
    )


def test_a_profile_leaves_no_trace():
    network = MODELS.build(classifier())
    network.backbone.layer1.eval()  # as a frozen stage
    modes = [m.training for m in network.modules()]
    state = copy.deepcopy(network.state_dict())
    numbers = torch.get_rng_state()
    profile(network, SHAPE)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [m.training for m in network.modules()] == modes
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    for module in network.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


# --- after the conversion ----------------------------------------------------


def test_floating_turns_quantizers_off_and_on():
    model = joint_qat(guidance=None)
    bits = [q.bits for _, q in named_quantizers(model)]
    inputs, _ = batch()
    model.eval()
    with floating(model):
        found = model(inputs)  # without scales
    assert [q.bits for _, q in named_quantizers(model)] == bits
    restore(model.architecture)
    assert torch.equal(found, model(inputs))


def test_layers_that_a_pass_does_not_reach():
    network = joint_qat(guidance=None).architecture
    images = torch.randn(1, *SHAPE)
    assert unreached_layers(network, images) == []
    conv = network.backbone.layer2[0].conv1
    conv.input_quantizer = nn.Sequential(conv.input_quantizer)
    assert unreached_layers(network, images) == []
    plain = nn.Conv2d(4, 8, 3, 2, 1)
    conv.forward = plain.forward  # as if it were replaced while running
    assert unreached_layers(network, images) == ['backbone.layer2.0.conv1']
    assert not any(q._forward_pre_hooks for _, q in named_quantizers(network))


@pytest.mark.parametrize(
    'output, index',
    [
        (torch.ones(2, 3), None),
        ((torch.ones(2, 3), torch.ones(4)), 0),
        ([torch.ones(2, 3)], 0),
    ],
)
def test_logits_are_the_output_or_its_first_part(output, index):
    assert logits_in(output) is (output if index is None else output[index])


@pytest.mark.parametrize(
    'output', [None, (), [], 'text', torch.ones(3), torch.ones(2, 3, 4)]
)
def test_what_is_no_logits(output):
    assert logits_in(output) is None
