"""How many values a quantized tensor really takes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmauxq.forward_hooks import forward_hooks
from mmauxq.quantizers import Quantizer, named_quantizers


@dataclass(frozen=True)
class LevelCount:
    """The audit of one quantizer.

    Args:
        name: Name of the quantizer.
        bits: Its width in bits.
        levels: Most distinct values seen for one scale (one channel, where
            scales are per channel).
    """

    name: str
    bits: int
    levels: int

    @property
    def holds(self) -> bool:
        """Whether the width is true: at most ``2**bits`` values."""
        return self.levels <= 2**self.bits


@torch.no_grad()
def operand_values(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """What every quantizer gives in one forward pass of ``model``.

    Args:
        model: An algorithm or architecture in evaluation mode.
        inputs: (N, C, H, W), preprocessed.

    Returns:
        Name of a quantizer -> its output.
    """
    values: dict[str, Tensor] = {}
    with forward_hooks(
        named_quantizers(model),
        lambda name, _, x, output: values.update({name: output}),
    ):
        model(inputs, mode='tensor')
    return values


def count_levels(model: nn.Module, inputs: Tensor) -> list[LevelCount]:
    """Audit all quantizers of ``model`` on real data.

    Args:
        model: An algorithm or architecture in evaluation mode.
        inputs: (N, C, H, W), preprocessed.
    """
    values = operand_values(model, inputs)
    return [
        LevelCount(name, quantizer.bits, _levels(quantizer, values[name]))
        for name, quantizer in named_quantizers(model)
        if name in values
    ]


def _levels(quantizer: Quantizer, value: Tensor) -> int:
    return max(len(row.unique()) for row in quantizer.rows(value))
