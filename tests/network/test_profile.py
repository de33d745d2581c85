"""What one pass tells of an architecture."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.layers.test_weight_uses import CHANGES, Reader, SelfAttention, trace


@pytest.fixture
def x():
    return torch.randn(2, 3, 4)


# --- how weights are used ---------------------------------------------------


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_weight_that_is_read_is_found(x, change):
    uses = trace(Reader(change), x)
    assert list(uses) == ['qkv', 'proj']
    assert uses['qkv'].readers == ['']
    assert not uses['qkv'].called
    assert uses['proj'].called and not uses['proj'].readers


def test_the_weights_of_subclasses_are_their_own(x):
    class Standardised(nn.Linear):
        def forward(self, x):
            return F.linear(x, F.normalize(self.weight), self.bias)

    uses = trace(nn.Sequential(Standardised(4, 2)), x)
    assert uses['0'].called and not uses['0'].reason


def test_a_layer_that_runs_twice_is_one_layer(x):
    layer = nn.Linear(4, 4)
    assert list(trace(nn.Sequential(layer, layer), x)) == ['0']


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.fc.weight.t()


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.a.weight + self.b.weight)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(4))

    def forward(self, x):
        return F.linear(x, self.matrix)


@pytest.mark.parametrize(
    'kind, name, reason',
    [
        (Transposed, '0.fc', 'its weight enters a matmul'),
        (Mixture, '0.b', '0 multiplies by a mixture of it and other weights'),
        (Bare, '0', 'its weight is a parameter of its own, in no layer'),
    ],
)
def test_what_cannot_be_quantized_says_why(x, kind, name, reason):
    assert trace(nn.Sequential(kind()), x)[name].reason == reason


def test_products_of_data_are_no_layers(x):
    class Attention(nn.Module):
        def forward(self, x):
            return F.linear(x, x[0]) @ x

    assert trace(Attention(), x) == {}


def test_attention_with_separate_projections_says_so():
    model = SelfAttention(batch_first=True, kdim=4, vdim=4)
    q, k = torch.randn(2, 5, 8), torch.randn(2, 7, 4)
    assert 'separate' in trace(model, q, k, k)['attn'].reason
