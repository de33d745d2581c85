"""What is not kept for the backward pass, and that no one can tell."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mmauxq.accelerate.recompute import Recompute
from mmauxq.errors import UsageError
from mmauxq.layers import LayerBits, convert
from mmauxq.quantizers import calibrate


class Bottleneck(nn.Module):
    def __init__(self, before, width, after):
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, after, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if before != after:
            self.down = nn.Sequential(
                nn.Conv2d(before, after, 1), nn.BatchNorm2d(after)
            )

    def forward(self, x):
        identity = x if self.down is None else self.down(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += identity
        return self.relu(y)


class Inverted(nn.Module):
    """Signed inputs, ReLU6, a depthwise convolution, a sum out of place."""

    def __init__(self, channels):
        super().__init__()
        wide = 3 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.body(x)


class Transformer(nn.Module):
    """Tokens, layer norm, GELU, attention by views of one tensor."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2).contiguous()
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1)).unbind(-2)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def network(kind, activation_bits=4):
    blocks = dict(
        bottleneck=[Bottleneck(8, 4, 16), *[Bottleneck(16, 4, 16)] * 3],
        inverted=[Inverted(8), Inverted(8)],
        transformer=[Transformer(8), Transformer(8)],
    )[kind]
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        *[copy.deepcopy(block) for block in blocks],
    )
    bits = {
        name: LayerBits(4, activation_bits, '')
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and name != '0'
    }
    activation = dict(bottleneck='mmauxq.LSQ', inverted='mmauxq.LSQPlus').get(
        kind, 'mmauxq.LSQ'
    )
    convert(
        model,
        bits,
        dict(type='mmauxq.LSQ', bits=4),
        dict(type=activation, bits=activation_bits),
    )
    x = torch.randn(4, 3, 8, 8)
    calibrate(model, lambda: model(x))
    return model, x


def step(model, x, level, amp=False):
    """Loss, gradients and buffers, in a copy; and the bytes kept."""
    model = copy.deepcopy(model)
    alive = {}

    def note(module, args, output):
        storage = output.untyped_storage()
        alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())

    for module in model.modules():
        # layers, quantizers, blocks
        if not isinstance(module, nn.Sequential):
            module.register_forward_hook(note)
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        if level is None:
            loss = model(x).float().square().mean()
        else:
            with Recompute(level):
                loss = model(x).float().square().mean()
    kept = sum(size for ref, size in alive.values() if not ref.expired())
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return loss, grads, dict(model.named_buffers()), kept


@pytest.mark.parametrize('amp', [False, True])
@pytest.mark.parametrize('kind', ['bottleneck', 'inverted', 'transformer'])
def test_a_step_is_the_same_to_the_bit(kind, amp):
    model, x = network(kind)
    loss, grads, buffers, kept = step(model, x, None, amp)
    before = kept
    for level in ('codes', 'recompute'):
        found = step(model, x, level, amp)
        assert torch.equal(found[0], loss)
        for name, grad in grads.items():
            assert torch.equal(found[1][name], grad), (level, name)
        for name, buffer in buffers.items():
            assert torch.equal(found[2][name], buffer), (level, name)
        assert found[3] < before, level  # each level keeps less
        before = found[3]
    assert kept > 0


@pytest.mark.parametrize('level', ['codes', 'recompute'])
def test_codes_that_no_byte_holds(level):
    model, x = network('bottleneck', 16)
    loss, grads, *_ = step(model, x, None)
    found = step(model, x, level)
    assert torch.equal(found[0], loss)
    for name, grad in grads.items():
        assert torch.equal(found[1][name], grad), name


def test_how_much_a_residual_network_keeps():
    """Of three tensors between two products one is kept, then none."""
    model, x = network('bottleneck')
    kept = {
        level: step(model, x, level)[3]
        for level in (None, 'codes', 'recompute')
    }
    assert kept['codes'] < 0.55 * kept[None]
    assert kept['recompute'] < 0.3 * kept[None]


@pytest.mark.parametrize('level', ['codes', 'recompute'])
@pytest.mark.parametrize('padding', [0, 1])
def test_where_maxima_lie_is_not_kept(level, padding, monkeypatch):
    """It would be four times the bytes of the maxima in half precision."""
    stem, x = network('bottleneck')
    pool = nn.MaxPool2d(3, 2, padding)
    model = nn.Sequential(*stem[:3], pool, stem[3])
    slots = []
    pack = Recompute._pack

    def noted(self, tensor):
        slots.append((tensor.dtype, pack(self, tensor)))
        return slots[-1][1]

    monkeypatch.setattr(Recompute, '_pack', noted)
    loss, grads, *_ = step(model, x, None)
    found = step(model, x, level)
    assert torch.equal(found[0], loss)
    for name, grad in grads.items():
        assert torch.equal(found[1][name], grad), name
    places = [slot for dtype, slot in slots if dtype == torch.int64]
    assert len(places) == 1
    assert not torch.is_tensor(places[0].content)


@pytest.mark.parametrize(
    'how',
    [
        dict(kernel_size=2),
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=2, stride=2, ceil_mode=True),
        dict(kernel_size=2, stride=1, dilation=2),
        dict(kernel_size=3, stride=2, return_indices=True),
    ],
)
def test_poolings_of_all_kinds(how):
    x = torch.randn(2, 3, 7, 7, requires_grad=True)
    with Recompute('codes'):
        found = F.max_pool2d(x.sigmoid(), **how)
    expected = F.max_pool2d(x.sigmoid(), **how)
    if how.get('return_indices'):
        assert torch.equal(found[1], expected[1])
        found, expected = found[0], expected[0]
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    (ours,) = torch.autograd.grad(found, x, upstream)
    (theirs,) = torch.autograd.grad(expected, x, upstream)
    assert torch.equal(ours, theirs)


class Convolutions(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **kwargs or {})


def test_no_product_is_computed_again_for_another():
    """The second is kept, because it would take the first."""
    convs = [nn.Conv2d(3, 3, 3) for _ in 'xy']
    x = torch.randn(2, 3, 7, 7)
    with Recompute('recompute'):
        y = F.silu(convs[1](convs[0](x))).sum()
    with Convolutions() as again:
        y.backward()
    assert again.count == 1


def test_a_sum_of_two_kept_tensors_is_kept_instead():
    alive = []

    def noted(x):
        alive.append(StorageWeakRef(x.untyped_storage()))
        return x

    x = torch.randn(3, 4, requires_grad=True)
    with Recompute('codes'):
        y = F.silu(noted(noted(x.sin()) + noted(x.cos())))
    assert [ref.expired() for ref in alive] == [True, True, False]
    y.sum().backward()


def test_two_backward_passes():
    model, x = network('bottleneck')
    weight = model[3].conv2.weight
    with Recompute('recompute'):
        loss = model(x).square().mean()
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    again = torch.autograd.grad(loss, weight)[0]
    assert torch.equal(first, again)


def test_frozen_normalisation_uses_its_statistics():
    model, x = network('bottleneck')
    model.eval()
    expected, found = step(model, x, None), step(model, x, 'recompute')
    for name, grad in expected[1].items():
        assert torch.equal(found[1][name], grad), name


def test_a_tensor_that_is_overwritten_is_seen():
    x = torch.randn(3, 4, requires_grad=True)
    with Recompute('codes'):
        kept = x * 2
        y = F.relu(kept)
        kept.mul_(2)
    with pytest.raises(UsageError, match='overwritten in place') as caught:
        y.sum().backward()
    assert '\n' not in str(caught.value)


def test_what_it_does_not_know_is_kept():
    x = torch.randn(3, 4, requires_grad=True)
    with Recompute('recompute'):
        y = (x.tanh() * x.exp()).relu().sigmoid().sum()
    (found,) = torch.autograd.grad(y, x)
    (expected,) = torch.autograd.grad(
        (x.tanh() * x.exp()).relu().sigmoid().sum(), x
    )
    assert torch.equal(found, expected)


def test_an_unknown_level_is_one_line():
    with pytest.raises(
        UsageError, match=r"one of .*codes.*recom.* got 'less'"
    ):
        Recompute('less')
