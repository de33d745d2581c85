"""Multiply-adds, bit-operations and bytes of every layer."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmauxq.forward_hooks import forward_hooks
from mmauxq.layers import QuantLayer
from mmauxq.layers.weight_uses import QUANTIZABLE
from mmauxq.quantizers import FLOAT_BITS


@dataclass(frozen=True)
class LayerCost:
    """A convolution or linear layer for one image.

    Args:
        weight_bits: Bits of its weight; 32 for floating point.
        activation_bits: Bits of its input.
        parameters: Number of weights and biases.
    """

    name: str
    weight_bits: int
    activation_bits: int
    parameters: int
    multiply_adds: int

    @property
    def bit_operations(self) -> int:
        """Multiply-adds times the bits of both operands."""
        return self.multiply_adds * self.weight_bits * self.activation_bits


def _bits(layer: nn.Module, role: str) -> int:
    if not isinstance(layer, QuantLayer):
        return FLOAT_BITS
    return getattr(getattr(layer, f'{role}_quantizer'), 'bits', FLOAT_BITS)


@torch.no_grad()
def layer_costs(model: nn.Module, image: Tensor) -> list[LayerCost]:
    """The layers that run, in their order.

    Args:
        model: An algorithm or architecture in evaluation mode.
        image: (1, C, H, W).
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QUANTIZABLE)
    }
    products: Counter[str] = Counter()

    def count(name: str, layer: nn.Module, _: Tensor, output: Tensor) -> None:
        weights_of_one = layer.weight[0].numel()
        products[name] += output.numel() * weights_of_one

    with forward_hooks(layers.items(), count):
        model(image, mode='tensor')
    return [
        LayerCost(
            name,
            _bits(layers[name], 'weight'),
            _bits(layers[name], 'input'),
            sum(p.numel() for p in layers[name].parameters(recurse=False)),
            multiply_adds,
        )
        for name, multiply_adds in products.items()
    ]
