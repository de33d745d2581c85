"""The weights of a network, quantized together."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

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


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('weight', ['mmauxq.LSQ', 'mmauxq.LSQPlus'])
@pytest.mark.parametrize('groups', [1, 2])
def test_equals_the_layers_one_by_one(weight, per_channel, groups):
    model, x = network(per_channel, weight)
    expected = model(x)
    expected.square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    grouped = GroupedWeights()
    with use_form('kernel'), grouped.active(model, groups):
        found = model(x)
    assert len(grouped.entries) == 3  # without the standardised one
    assert len(grouped.groups) == groups
    assert torch.equal(found, expected)
    found.square().sum().backward()
    for name, p in model.named_parameters():
        if name.endswith('weight'):
            assert torch.equal(p.grad, grads[name]), name
        else:
            assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-4)


def test_afterwards_all_is_as_before():
    model, x = network(False)
    grouped = GroupedWeights()
    with use_form('kernel'), pytest.raises(RuntimeError, match='stop'):
        with grouped.active(model):
            raise RuntimeError('stop')
    weight = model[0].weight
    assert grouped.entries and model[0].precomputed(weight) is None


def test_another_tensor_is_quantized_as_ever():
    """A module that reads the weight may reshape it before."""
    model, x = network(False)
    quantizer = model[0].weight_quantizer
    other = model[0].weight.detach() * 2
    expected = quantizer(other)
    with use_form('kernel'), GroupedWeights().active(model):
        assert torch.equal(model[0].quantized_weight(other), expected)


def test_short_precision_of_autocast():
    model, x = network(False)
    with (
        use_form('kernel'),
        torch.autocast(DEVICE, torch.bfloat16),
        GroupedWeights().active(model),
    ):
        weight = model[0].quantized_weight(model[0].weight)
        assert weight.dtype == torch.bfloat16


def test_without_kernels_the_layers_do_it_themselves():
    model, x = network(False)
    expected = model(x)
    grouped = GroupedWeights()
    with use_form('reference'), grouped.active(model):
        assert torch.equal(model(x), expected)
    assert grouped.entries == []
