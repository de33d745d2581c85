"""In-place operations act in every form of a step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmauxq.accelerate.fused_norm import FusedBatchNorms
from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.accelerate.recompute import Recompute

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def relu_of_torch(net, x):
    y = net.norm1(net.conv1(x))
    torch.relu_(y)
    return net.conv2(y)


def relu_of_tensor(net, x):
    y = net.norm1(net.conv1(x))
    y.relu_()
    return net.conv2(y)


def relu_inplace(net, x):
    y = net.norm1(net.conv1(x))
    F.relu(y, inplace=True)
    return net.conv2(y)


def relu_by_name(net, x):
    y = net.norm1(net.conv1(x))
    F.relu(input=y, inplace=True)
    return net.conv2(y)


def add_to_a_tensor(net, x):
    y = F.relu(net.norm1(net.conv1(x)))
    z = y * 1.0
    z.add_(net.norm2(net.conv2(y)))
    return z * 2


def iadd_to_a_tensor(net, x):
    y = F.relu(net.norm1(net.conv1(x)))
    z = y * 1.0
    alias = z
    z += net.norm2(net.conv2(y))
    return alias * 2


def add_to_a_norm(net, x):
    y = F.relu(net.norm1(net.conv1(x)))
    z = net.norm2(net.conv2(y))
    z.add_(y)
    return z * 2


def iadd_to_a_norm(net, x):
    y = F.relu(net.norm1(net.conv1(x)))
    z = net.norm2(net.conv2(y))
    alias = z
    z += y
    return F.relu(alias)


def clip_of_a_norm(net, x):
    y = net.norm1(net.conv1(x))
    y.clamp_(-0.5, 0.5)
    return net.conv2(y)


def view_of_a_norm(net, x):
    y = net.norm1(net.conv1(x))
    flat = y.reshape(-1)
    torch.relu_(y)
    return flat * 2


def bound_again(net, x):
    y = torch.relu_(net.norm1(net.conv1(x)))
    y = y + net.norm2(net.conv2(y))
    return y * 2


WAYS = [
    relu_of_torch, relu_of_tensor, relu_inplace, relu_by_name,
    add_to_a_tensor, iadd_to_a_tensor, add_to_a_norm, iadd_to_a_norm,
    clip_of_a_norm, view_of_a_norm, bound_again,
]  # fmt: skip


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.way = way

    def forward(self, x):
        return self.way(self, x)


def result(net, x):
    """The output, and the gradients of everything."""
    net.zero_grad()
    output = net(x)
    weights = torch.arange(output.numel(), device=x.device).cos()
    (output * weights.view(output.shape)).sum().backward()
    return [output.detach(), *(p.grad for p in net.parameters()
                               if p.grad is not None)]  # fmt: skip


@pytest.fixture
def x():
    x = torch.randn(2, 3, 6, 6, device=DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
def test_fused_batch_norms_obey(way, x):
    net = Net(way).to(DEVICE, memory_format=torch.channels_last)
    expected = result(net, x)
    with use_form('kernel'):
        fused = FusedBatchNorms()
        with fused:
            fused.plan([net(x)])
        assert fused.fusions
        with fused:
            found = result(net, x)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('level', ['codes', 'recompute'])
@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
def test_recomputation_obeys(way, level, x):
    net = Net(way).to(DEVICE)
    expected = result(net, x)
    with Recompute(level):
        found = result(net, x)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize('level', ['codes', 'recompute'])
def test_overwriting_a_saved_tensor_is_refused_as_by_autograd(level):
    def loss(weight):
        y = (weight * torch.ones(4)).exp()  # saves its result
        y.mul_(2)
        return y.sum()

    weight = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match='modified by an inplace op'):
        loss(weight).backward()
    with Recompute(level):
        total = loss(weight)
    with pytest.raises(RuntimeError, match='modified by an inplace op'):
        total.backward()
