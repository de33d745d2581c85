"""The weights of a network, quantized together."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mmauxq.accelerate.grouped_weights import GroupedWeights
from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.layers import LayerBits, convert
from mmauxq.quantizers import calibrate

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def network(per_channel, weight='mmauxq.LSQ'):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        Standardised(4, 4, 1),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).to(DEVICE)
    model[0].to(memory_format=torch.channels_last)
    bits = {name: LayerBits(4, 4, '') for name in ('0', '2', '3')}
    bits['5'] = LayerBits(2, 8, '')
    convert(
        model,
        bits,
        dict(type=weight, bits=4, per_channel=per_channel),
        dict(type='mmauxq.LSQ', bits=4),
    )
    model.to(DEVICE)
    x = torch.randn(2, 3, 4, 4, device=DEVICE)
    calibrate(model, lambda: model(x))
    return model, x


def forward_and_backward(model, x, grouped, groups=1):
    """Its output and its gradients."""
    model.zero_grad()
    with use_form('kernel'), grouped.active(model, groups):
        found = model(x)
    found.square().sum().backward()
    return found, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('weight', ['mmauxq.LSQ', 'mmauxq.LSQPlus'])
@pytest.mark.parametrize('groups', [1, 2])
def test_equals_the_layers_one_by_one(weight, per_channel, groups):
    model, x = network(per_channel, weight)
    expected = model(x)
    expected.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    grouped = GroupedWeights()
    found, found_grads = forward_and_backward(model, x, grouped, groups)
    # without the standardised one
    assert [e.layer for e in grouped.entries] == [model[0], model[3], model[5]]
    assert len(grouped.groups) == groups
    assert torch.equal(found, expected)
    for name, grad in found_grads.items():
        if name.endswith('weight'):
            assert torch.equal(grad, grads[name]), name
        else:
            assert_close(grad, grads[name], rtol=1e-4, atol=1e-4)


def test_afterwards_all_is_as_before():
    """Weights change between steps: a layer must not use the old ones."""
    model, x = network(False)
    grouped = GroupedWeights()
    with use_form('kernel'):
        with pytest.raises(RuntimeError, match='stop'), grouped.active(model):
            assert grouped.is_valid()
            raise RuntimeError('stop')
        assert not grouped.is_valid()
        with grouped.active(model):
            pass
    with torch.no_grad():
        model[0].weight.mul_(2)
    fresh = model[0].weight_quantizer(model[0].weight)
    assert torch.equal(model[0].quantized_weight(model[0].weight), fresh)


def test_a_layer_that_is_run_again_in_the_backward_pass():
    """By activation checkpointing: with the weight of the forward pass."""
    model, x = network(False)
    plain = forward_and_backward(model, x, GroupedWeights())
    body = model[3]
    calls = []
    body.weight_quantizer.register_forward_hook(lambda *_: calls.append(1))
    original = body.forward
    body.forward = lambda x: checkpoint(original, x, use_reentrant=False)
    found = forward_and_backward(model, x, GroupedWeights())
    assert calls == []
    assert torch.equal(found[0], plain[0])
    for name, grad in plain[1].items():
        assert_close(found[1][name], grad, rtol=1e-4, atol=1e-4)


def test_another_tensor_is_quantized_as_ever():
    """A module that reads the weight may reshape it before."""
    model, x = network(False)
    other = model[0].weight.detach() * 2
    expected = model[0].weight_quantizer(other)
    with use_form('kernel'), GroupedWeights().active(model):
        assert torch.equal(model[0].quantized_weight(other), expected)


def test_what_was_computed_is_used():
    model, x = network(False)
    layer, grouped = model[0], GroupedWeights()
    with use_form('kernel'), grouped.active(model):
        found = layer.quantized_weight(layer.weight)
        assert found is grouped.entries[0].result


def test_short_precision_of_autocast():
    model, x = network(False)
    layer = model[0]
    with (
        use_form('kernel'),
        torch.autocast(DEVICE, torch.bfloat16),
        GroupedWeights().active(model),
    ):
        assert layer.quantized_weight(layer.weight).dtype == torch.bfloat16
        # a region of full precision quantizes on its own
        with torch.autocast(DEVICE, enabled=False):
            wide = layer.quantized_weight(layer.weight)
        assert wide.dtype == torch.float32
        assert torch.equal(wide, layer.weight_quantizer(layer.weight))


def test_without_kernels_the_layers_do_it_themselves():
    model, x = network(False)
    expected = model(x)
    grouped = GroupedWeights()
    with use_form('reference'), grouped.active(model):
        assert torch.equal(model(x), expected)
    assert grouped.entries == []


def test_what_changes_between_steps_is_seen():
    """A weight that is replaced, bits that a hook changes."""
    model, x = network(False)
    grouped = GroupedWeights()
    forward_and_backward(model, x, grouped)
    first = grouped.entries
    forward_and_backward(model, x, grouped)
    assert grouped.entries is first
    model[0].weight = nn.Parameter(model[0].weight.detach() * 3)
    found, _ = forward_and_backward(model, x, grouped)
    assert torch.equal(found, model(x))
    model[3].weight_quantizer.bits = 32
    found, _ = forward_and_backward(model, x, grouped)
    assert [entry.layer for entry in grouped.entries] == [model[0], model[5]]
    assert model[3].precomputed is None
    assert torch.equal(found, model(x))


def test_a_copy_has_none_of_it():
    model, x = network(False)
    forward_and_backward(model, x, GroupedWeights())
    for layer in copy.deepcopy(model):
        assert getattr(layer, 'precomputed', None) is None
