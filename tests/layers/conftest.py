"""Layers of all kinds, and what each of them multiplies."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn


class PaddedConv2d(nn.Conv2d):
    """Pads in its forward, as mmcv's ``Conv2dAdaptivePadding`` does."""

    def forward(self, x):
        x = F.pad(x, [0, 1, 0, 1])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class StandardisedConv2d(nn.Conv2d):
    """Standardises its weight in its forward."""

    def standardised(self, w):
        mean, std = w.mean((1, 2, 3), True), w.std((1, 2, 3), keepdim=True)
        return (w - mean) / (std + 1e-5)

    def forward(self, x):
        return F.conv2d(
            weight=self.standardised(self.weight), input=x, bias=self.bias
        )


class HalvedConv2d(nn.Conv2d):
    """Changes its weight one call further down."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight / 2, bias)


class NormalisedLinear(nn.Linear):
    """Multiplies with rows of unit length."""

    def forward(self, input):
        return F.linear(input, F.normalize(self.weight), self.bias)


class RenamedLinear(nn.Linear):
    """A subclass that computes as its base does."""


class Sample(NamedTuple):
    """A layer, an input, and the product by hand."""

    layer: nn.Module
    x: torch.Tensor
    pad: object  # x -> what enters the product
    weight: object  # layer -> what enters the product
    product: object  # (layer, padded x, weight) -> output


def same(x):
    return x


def stored(layer):
    return layer.weight


def convolve(function):
    def product(layer, x, weight):
        return function(
            x,
            weight,
            layer.bias,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )

    return product


def multiply(layer, x, weight):
    return F.linear(x, weight, layer.bias)


def conv1d():
    layer = nn.Conv1d(3, 4, 3, stride=2, padding=1)
    return Sample(
        layer, torch.randn(2, 3, 9), same, stored, convolve(F.conv1d)
    )


def conv2d():
    layer = nn.Conv2d(4, 6, 3, padding=1, dilation=2, groups=2, bias=False)
    return Sample(
        layer, torch.randn(2, 4, 8, 8), same, stored, convolve(F.conv2d)
    )


def reflected_conv2d():
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode='reflect')
    return Sample(
        layer,
        torch.randn(2, 3, 6, 6),
        same,
        stored,
        # the values that are there are quantized, then reflected
        lambda layer, x, weight: F.conv2d(
            F.pad(x, [1, 1, 1, 1], mode='reflect'), weight, layer.bias
        ),
    )


def conv3d():
    layer = nn.Conv3d(2, 3, 3)
    return Sample(
        layer, torch.randn(2, 2, 5, 5, 5), same, stored, convolve(F.conv3d)
    )


def linear():
    return Sample(
        nn.Linear(5, 4), torch.randn(2, 3, 5), same, stored, multiply
    )


def renamed_linear():
    return Sample(
        RenamedLinear(5, 4), torch.randn(6, 5), same, stored, multiply
    )


def padded_conv2d():
    return Sample(
        PaddedConv2d(3, 4, 2, stride=2),
        torch.randn(2, 3, 7, 7),
        lambda x: F.pad(x, [0, 1, 0, 1]),
        stored,
        convolve(F.conv2d),
    )


def standardised_conv2d():
    return Sample(
        StandardisedConv2d(3, 4, 3),
        torch.randn(2, 3, 6, 6),
        same,
        lambda layer: StandardisedConv2d.standardised(layer, layer.weight),
        convolve(F.conv2d),
    )


def halved_conv2d():
    return Sample(
        HalvedConv2d(3, 4, 3),
        torch.randn(2, 3, 6, 6),
        same,
        lambda layer: layer.weight / 2,
        convolve(F.conv2d),
    )


def normalised_linear():
    return Sample(
        NormalisedLinear(5, 4),
        torch.randn(6, 5),
        same,
        lambda layer: F.normalize(layer.weight),
        multiply,
    )


def mmcv_padded_conv2d():
    bricks = pytest.importorskip('mmcv.cnn.bricks')
    return Sample(
        bricks.Conv2dAdaptivePadding(3, 4, 3, stride=2),
        torch.randn(2, 3, 8, 8),
        lambda x: F.pad(x, [0, 1, 0, 1]),
        stored,
        convolve(F.conv2d),
    )


def mmcv_standardised_conv2d():
    cnn = pytest.importorskip('mmcv.cnn')

    def weight(layer):
        rows = layer.weight.view(4, -1)
        mean, std = rows.mean(1, True), rows.std(1, keepdim=True)
        by_row = (4, 1, 1, 1)
        return (layer.weight - mean.view(by_row)) / (
            std.view(by_row) + layer.eps
        )

    return Sample(
        cnn.ConvWS2d(3, 4, 3, padding=1),
        torch.randn(2, 3, 6, 6),
        same,
        weight,
        convolve(F.conv2d),
    )


MAKERS = [
    conv1d,
    conv2d,
    reflected_conv2d,
    conv3d,
    linear,
    renamed_linear,
    padded_conv2d,
    standardised_conv2d,
    halved_conv2d,
    normalised_linear,
    mmcv_padded_conv2d,
    mmcv_standardised_conv2d,
]


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def sample(request) -> Sample:
    """Each kind of layer in turn."""
    return request.param()
