"""Bytes of a network at the widths that it was trained for."""

import math

from torch import nn

from mmauxq.layers import QuantLayer
from mmauxq.quantizers import Quantizer


def deployed_bytes(model: nn.Module) -> int:
    """Size of F if every weight takes the bits that it was trained with.

    Counted: quantized weights at their width (each tensor rounded up to whole
    bytes), and all other parameters and buffers (float weights, biases, batch
    norm, scales) as they are stored, 4 bytes for a float32.

    Args:
        model: An architecture, quantized or float.
    """
    total = 0
    quantized: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, QuantLayer) and isinstance(
            module.weight_quantizer, Quantizer
        ):
            quantized[id(module.product_weight)] = module.weight_quantizer.bits
    for parameter in model.parameters():
        bits = quantized.get(id(parameter), 8 * parameter.element_size())
        total += math.ceil(parameter.numel() * bits / 8)
    return total + sum(
        buffer.numel() * buffer.element_size() for buffer in model.buffers()
    )
