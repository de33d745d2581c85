"""Faster forms of operations, in the place of torch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmauxq.accelerate import faster_operations as faster
from mmauxq.accelerate import space_to_depth
from mmauxq.accelerate.faster_operations import FasterOperations
from mmauxq.accelerate.fused_norm import (
    QUANTIZE,
    RELU,
    DeferredTensor,
    FusedBatchNorms,
    Fusion,
)
from mmauxq.accelerate.kernels.dispatch import use_form

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def kernels():
    with use_form('kernel'):
        yield


def images(*shape):
    x = torch.randn(shape, device=DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


class Stem(nn.Module):
    """As a ResNet begins."""

    def __init__(self, **pool):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1, **pool)

    def forward(self, x):
        return self.pool(F.relu(self.norm(self.conv(x))))


def counted(monkeypatch, place, name):
    seen, before = [], getattr(place, name)

    def call(*args, **kwargs):
        seen.append(type(args[0]))
        return before(*args, **kwargs)

    monkeypatch.setattr(place, name, call)
    return seen


def train(net, x, modes, half=False):
    """Result and gradients of a second step; the first is observed."""
    norms = FusedBatchNorms()
    for _ in range(2):
        net.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            if modes:
                with FasterOperations(), norms:
                    y = net(x)
            else:
                with norms:
                    y = net(x)
            norms.plan([y])
        y.float().square().sum().backward()
    assert list(norms.fusions.values()) == [Fusion(RELU, True)]
    return [y.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize('ceil_mode', [False, True])
def test_a_pooling_changes_nothing(ceil_mode, monkeypatch):
    net = Stem(ceil_mode=ceil_mode)
    net = net.to(DEVICE, memory_format=torch.channels_last)
    x = images(2, 3, 18, 15)
    pooled = counted(monkeypatch, faster, 'max_pool')
    convolved = counted(monkeypatch, space_to_depth, 'convolve')
    expected = train(net, x, modes=False)
    assert not pooled
    found = train(net, x, modes=True)
    assert pooled == ([] if ceil_mode else [torch.Tensor] * 2)
    assert not convolved  # float32
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_convolution_of_images_differs_by_rounding(monkeypatch):
    net = Stem().to(DEVICE, memory_format=torch.channels_last)
    x = images(2, 3, 18, 15)
    convolved = counted(monkeypatch, space_to_depth, 'convolve')
    wide = train(net, x, modes=False)
    expected = train(net, x, modes=False, half=True)
    assert not convolved
    found = train(net, x, modes=True, half=True)
    assert convolved == [torch.Tensor] * 2
    for ours, theirs, exact in zip(found, expected, wide, strict=True):
        error = (ours - exact).norm() / exact.norm()
        assert error < 1.5 * (theirs - exact).norm() / exact.norm() + 1e-3


def test_what_waits_is_computed_first():
    z = images(2, 4, 6, 6).requires_grad_()
    plain = z * 2
    waits = DeferredTensor(z, None, Fusion(QUANTIZE, True), value=plain)
    with FasterOperations(), FusedBatchNorms():
        found = F.max_pool2d(waits, 3, 2, 1)
    assert 'MaxPoolBackward' in found.grad_fn.name()
    assert found.grad_fn.next_functions[0][0] is plain.grad_fn
    assert torch.equal(found, F.max_pool2d(plain, 3, 2, 1))


def test_what_keeps_nothing_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(faster, 'max_pool', None)
    monkeypatch.setattr(space_to_depth, 'convolve', None)
    x, w = images(2, 4, 6, 6), torch.randn(8, 4, 3, 3, device=DEVICE)
    with FasterOperations():
        found = F.max_pool2d(x, 2)
        with torch.no_grad():
            again = F.max_pool2d(x.clone().requires_grad_(), 2)
            F.conv2d(x.bfloat16(), w.bfloat16(), None, 2, 1)
        pair = F.max_pool2d(x.clone().requires_grad_(), 2, return_indices=True)
    assert torch.equal(found, again) and torch.equal(found, pair[0])


def test_calls_with_keywords_and_without():
    x, w = images(2, 3, 9, 9).bfloat16(), torch.randn(8, 3, 3, 3).to(DEVICE)
    w = w.bfloat16()
    with FasterOperations():
        named = F.conv2d(input=x, weight=w, stride=2, padding=1, groups=1)
        plain = F.conv2d(x, w, None, 2, 1, 1, 1)
        pooled = F.max_pool2d(input=x, kernel_size=2, stride=1)
    assert torch.equal(named, plain)
    assert torch.equal(pooled, F.max_pool2d(x, 2, 1))
