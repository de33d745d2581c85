"""What the weight quantizers of a network read."""

import torch
from torch import Tensor, nn

from mmauxq.quantizers import named_quantizers


@torch.no_grad()
def weight_operands(
    architecture: nn.Module, image: Tensor
) -> dict[str, Tensor]:
    """What reaches each weight quantizer in a forward pass."""
    operands: dict[str, Tensor] = {}
    handles = [
        quantizer.register_forward_pre_hook(
            lambda _, args, name=name: operands.update({name: args[0]})
        )
        for name, quantizer in named_quantizers(architecture)
        if quantizer.role == 'weight'
    ]
    try:
        architecture(image, mode='tensor')
    finally:
        for handle in handles:
            handle.remove()
    return operands
