"""Grouped weights where a layer does not simply run once in the step."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmauxq.accelerate.grouped_weights import GroupedWeights
from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.layers import quant_class
from mmauxq.quantizers import LSQ, calibrate

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def kernels():
    with use_form('kernel'):
        yield


def conv():
    layer = nn.Conv2d(4, 4, 3, padding=1)
    return quant_class(nn.Conv2d).from_float(layer, LSQ(4, 'weight'), LSQ(4))


@pytest.fixture
def net():
    net = nn.Sequential(conv(), conv()).to(DEVICE)
    calibrate(net, lambda: net(images()))
    return net


def images():
    return torch.randn(
        2, 4, 5, 5, generator=torch.Generator().manual_seed(3)
    ).to(DEVICE)


def gradients(net):
    found = {n: p.grad for n, p in net.named_parameters()}
    net.zero_grad()
    return found


@pytest.mark.parametrize('reentrant', [True, False])
def test_activation_checkpointing(net, reentrant):
    x = images().requires_grad_()
    net(x).square().sum().backward()
    expected = gradients(net)
    grouped = GroupedWeights()
    with grouped.active(net):
        y = net[1](checkpoint(net[0], x, use_reentrant=reentrant))
    assert len(grouped.entries) == 2
    y.square().sum().backward()
    for name, grad in gradients(net).items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_a_region_without_autocast(net):
    def run():
        with torch.autocast(DEVICE, enabled=False):
            return net(images())

    grouped = GroupedWeights()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        expected = run()
        with grouped.active(net):
            found = run()
            in_bfloat16 = net(images())
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    assert in_bfloat16.dtype == torch.bfloat16


def test_a_layer_that_does_not_run_gets_no_gradient(net):
    net[0](images()).sum().backward()
    expected = gradients(net)
    grouped = GroupedWeights()
    with grouped.active(net):
        y = net[0](images())
    y.sum().backward()
    found = gradients(net)
    assert found['1.weight'] is None
    assert found['1.weight_quantizer.step'] is None
    for name, grad in expected.items():
        if grad is not None:
            torch.testing.assert_close(found[name], grad, msg=name)


def test_weights_that_changed_are_quantized_anew(net):
    grouped = GroupedWeights()
    with grouped.active(net):
        net(images())
    for parameter in net.parameters():
        parameter.data.mul_(0.5)  # raises no version
    found = net(images())
    with use_form('reference'):
        assert torch.equal(found, net(images()))


def test_bits_may_change_between_steps(net):
    grouped = GroupedWeights()
    with grouped.active(net):
        net(images())
    quantizer = net[0].weight_quantizer
    quantizer.bits = 2
    quantizer._read_buffers()
    expected = net(images())
    with grouped.active(net):
        assert torch.equal(net(images()), expected)
        weight = net[0].quantized_weight(net[0].weight)
    assert len(weight.unique()) <= 4


def test_another_device_or_form_is_noticed(net):
    grouped = GroupedWeights()
    with grouped.active(net):
        net(images())
    assert len(grouped.entries) == 2
    with use_form('reference'), grouped.active(net):
        assert grouped.entries == []
        assert net[0].precomputed is None


def test_a_network_can_be_copied_and_stored_after_a_step(net):
    with GroupedWeights().active(net):
        expected = net(images())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin[0].precomputed is None
        assert torch.equal(twin(images()), expected)
