"""How many values a quantized tensor really takes."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmauxq.forward_hooks import forward_hooks
from mmauxq.quantizers import Quantizer, named_quantizers


@dataclass(frozen=True)
class LevelCount:
    """The most distinct values seen for one scale of a quantizer."""

    name: str
    bits: int
    levels: int

    @property
    def holds(self) -> bool:
        """Whether the width is true: at most ``2**bits`` values."""
        return self.levels <= 2**self.bits


@torch.no_grad()
def count_levels(model: nn.Module, inputs: Tensor) -> list[LevelCount]:
    """Audit all quantizers that run on preprocessed inputs, (N, C, H, W), of
    an algorithm or architecture in evaluation mode."""
    quantizers = dict(named_quantizers(model))
    levels: dict[str, int] = {}

    def count(name: str, quantizer: Quantizer, _: Tensor, y: Tensor) -> None:
        levels[name] = max(len(row.unique()) for row in quantizer.rows(y))

    with forward_hooks(quantizers.items(), count):
        model(inputs, mode='tensor')
    return [
        LevelCount(name, quantizer.bits, levels[name])
        for name, quantizer in quantizers.items()
        if name in levels
    ]
