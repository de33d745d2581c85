"""Bytes of a network at the widths that it was trained for."""

import math

from torch import Tensor, nn

from mmauxq.layers import QuantLayer
from mmauxq.quantizers import Quantizer


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
    """Size of F if every weight takes the bits that it was trained with.

    Counted are quantized weights at their width (each tensor rounded up to
    whole bytes), and all other parameters and buffers as they are stored.

    Args:
        model: An architecture, quantized or float.
    """
    bits = {id(w): q.bits for w, q in quantized_weights(model).values()}
    return sum(
        math.ceil(x.numel() * bits.get(id(x), 8 * x.element_size()) / 8)
        for x in (*model.parameters(), *model.buffers())
    )
