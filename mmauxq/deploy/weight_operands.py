"""What the weight quantizers of a network read."""

import torch
from torch import Tensor, nn

from mmauxq.forward_hooks import forward_hooks
from mmauxq.quantizers import named_quantizers


@torch.no_grad()
def weight_operands(
    architecture: nn.Module, image: Tensor
) -> dict[str, Tensor]:
    """What reaches each weight quantizer in a forward pass."""
    operands: dict[str, Tensor] = {}
    with forward_hooks(
        (
            (name, quantizer)
            for name, quantizer in named_quantizers(architecture)
            if quantizer.role == 'weight'
        ),
        lambda name, _, operand, output: operands.update({name: operand}),
    ):
        architecture(image, mode='tensor')
    return operands
