"""A network of three layers with any quantizers, without training."""

import torch
from torch import nn

from mmauxq.layers import quant_class
from mmauxq.quantizers import (
    LSQ,
    DoReFaActivation,
    DoReFaWeight,
    LSQPlus,
    PACTActivation,
    calibrate,
)

SHAPE = (3, 6, 6)


class Net(nn.Module):
    """Two convolutions and a linear layer, called as a classifier."""

    def __init__(self, weight, activation):
        super().__init__()

        def quantized(layer, channels):
            return quant_class(type(layer)).from_float(
                layer, weight(channels), activation()
            )

        self.layers = nn.Sequential(
            quantized(nn.Conv2d(3, 8, 3, padding=1), 8),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            quantized(nn.Conv2d(8, 8, 3, padding=1, bias=False), 8),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            quantized(nn.Linear(8, 5), 5),
        )

    def forward(self, x, mode='tensor'):
        return self.layers(x)


def images(count=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *SHAPE, generator=generator)


def prepared(weight, activation):
    """Calibrated, with batch norms as after training."""
    torch.manual_seed(0)
    network = Net(weight, activation).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    calibrate(network, lambda: network(images()))
    return network


def lsq(bits):
    return lambda channels: LSQ(bits, 'weight', channels)


CASES = {
    'LSQ, 2 bits': (lsq(2), lambda: LSQ(2)),
    'LSQ, 3 bits': (lsq(3), lambda: LSQ(3)),
    'LSQ, 8 bits': (lsq(8), lambda: LSQ(8)),
    'LSQ+, 4 bits': (
        lambda channels: LSQPlus(4, 'weight', channels),
        lambda: LSQPlus(4),
    ),
    'DoReFa and PACT, 4 bits': (
        lambda channels: DoReFaWeight(4),
        lambda: PACTActivation(4),
    ),
    'DoReFa, 8 bits': (
        lambda channels: DoReFaWeight(8),
        lambda: DoReFaActivation(8),
    ),
}
