"""Multiply-adds, bit-operations and bytes of a network."""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmauxq.forward_hooks import forward_hooks
from mmauxq.layers import QuantLayer
from mmauxq.layers.weight_uses import QUANTIZABLE
from mmauxq.quantizers import FLOAT_BITS, Quantizer

NO_LAYER = '(in no layer)'


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


def operand_bits(layer: nn.Module, role: str) -> int:
    """Those of the ``'weight'`` or the ``'input'`` of a layer; 32 if float."""
    quantizer = getattr(layer, f'{role}_quantizer', None)
    return getattr(quantizer, 'bits', FLOAT_BITS)


@torch.no_grad()
def layer_costs(model: nn.Module, image: Tensor) -> list[LayerCost]:
    """The layers that run, in their order, on an image (1, C, H, W), of an
    algorithm or architecture in evaluation mode.

    The last entry, :data:`NO_LAYER`, is what other parts multiply, in floating
    point, if they do: transposed convolutions, attention, matrices of their
    own.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, QUANTIZABLE)
    }
    products: Counter[str] = Counter()

    def count(name: str, layer: nn.Module, _: Tensor, output: Tensor) -> None:
        products[name] += output.numel() * layer.weight[0].numel()

    with (
        forward_hooks(layers.items(), count),
        FlopCounterMode(display=False) as counter,
    ):
        model(image, mode='tensor')
    rest = counter.get_total_flops() // 2 - sum(products.values())
    costs = [
        LayerCost(
            name,
            operand_bits(layers[name], 'weight'),
            operand_bits(layers[name], 'input'),
            sum(p.numel() for p in layers[name].parameters(recurse=False)),
            multiply_adds,
        )
        for name, multiply_adds in products.items()
    ]
    if rest > 0:
        costs.append(LayerCost(NO_LAYER, FLOAT_BITS, FLOAT_BITS, 0, rest))
    return costs


def quantized_weights(model: nn.Module) -> dict[str, tuple[Tensor, Quantizer]]:
    """Name of a parameter -> the parameter and its quantizer."""
    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer) and isinstance(
            layer.weight_quantizer, Quantizer
        ):
            weight = layer.product_weight
            key = next(k for k, p in layer._parameters.items() if p is weight)
            weights[f'{name}.{key}'] = (weight, layer.weight_quantizer)
    return weights


def deployed_bytes(model: nn.Module) -> int:
    """Size of F if every weight takes the bits that it was trained with,
    rounded up to whole bytes; the rest counts as it is stored."""
    bits = {id(w): q.bits for w, q in quantized_weights(model).values()}
    return sum(
        math.ceil(x.numel() * bits.get(id(x), 8 * x.element_size()) / 8)
        for x in (*model.parameters(), *model.buffers())
    )
