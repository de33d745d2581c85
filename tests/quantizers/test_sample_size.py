"""N of the gradient scale is the size of one sample, in any layout."""

import math

import pytest
import torch
from torch import nn

from mmauxq.layers import LayerBits, convert
from mmauxq.network.profile import LayerTracer
from mmauxq.quantizers import LSQ, calibrate

CFG = dict(type='mmauxq.LSQ', bits=4)


class Windows(nn.Module):
    """(N, 8, 8, C) in windows of 4 x 4, as in a Swin Transformer."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x):
        n = len(x)
        x = x.view(n, 2, 4, 2, 4, 6).transpose(2, 3).reshape(n * 4, 16, 6)
        return self.qkv(x)


class Attention(nn.Module):
    def __init__(self, batch_first, same=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.same = same

    def forward(self, x):
        x = x.flatten(1, 2)
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        other = x if self.same else x + 1
        return self.attention(x, other, other)[0]


def scale_of(model, name, count):
    """The N of the input of a layer, for a batch of ``count``."""
    tracer = LayerTracer(model, 1)
    with tracer.following(), torch.no_grad():
        model(torch.randn(1, 8, 8, 6))
    convert(model, {name: LayerBits(4, 4, '')}, CFG, CFG, tracer.layers)
    found = []
    quantizer = model.get_submodule(name).input_quantizer
    quantizer.register_forward_pre_hook(
        lambda q, args: found.append(q.values_per_scale(args[0]))
    )
    x = torch.randn(count, 8, 8, 6)
    calibrate(model, lambda: model(x))
    return found[0]


@pytest.mark.parametrize('count', [1, 5])
@pytest.mark.parametrize(
    'model, name, factor',
    [
        (lambda: nn.Sequential(nn.Linear(6, 6)), '0', 1),
        (Windows, 'qkv', 1),
        (lambda: Attention(True), 'attention', 1),
        (lambda: Attention(False), 'attention', 1),
        (lambda: Attention(True, same=False), 'attention', 3),
        (lambda: Attention(False, same=False), 'attention', 3),
    ],
)
def test_it_is_the_number_of_features_of_a_sample(model, name, factor, count):
    torch.manual_seed(0)
    assert scale_of(model(), name, count) == factor * math.prod((8, 8, 6))


def test_without_a_profile_the_samples_lie_along_axis_0():
    assert LSQ(4).values_per_scale(torch.zeros(5, 3, 2)) == 6


def test_each_channel_has_its_share():
    quantizer = LSQ(4, num_channels=6, channel_axis=-1)
    quantizer.sample_size = 8 * 8 * 6
    assert quantizer.values_per_scale(torch.zeros(20, 16, 6)) == 64
