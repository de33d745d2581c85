"""The weights of all layers, quantized together before the network runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mmauxq.ops import TogetherQuantizer, WeightRange, can_quantize_together
from mmauxq.ops.dispatch import wants_kernel
from mmauxq.quantizers import FLOAT_BITS, Quantizer

from .quantized import multiplies_by_its_weight


class WeightsAtOnce:
    """Hands every layer its quantized weight, from one launch for all.

    While :meth:`active`, the weight quantizers of the layers return what was
    computed for them; values and gradients are those they would find
    themselves. Only layers whose product is by the weight as it stands take
    part, with LSQ or LSQ+ quantizers, float32 weights, and on a GPU; the
    others go on as ever.

    Args:
        model: Whose quantized layers are meant; calibrated.
        groups: In how many launches. The gradients of a group appear
            together, when the backward pass is through all of its layers: with
            several groups, ranks exchange the first ones meanwhile.
    """

    def __init__(self, model: nn.Module, groups: int = 1) -> None:
        layers = {
            id(layer.weight_quantizer): layer
            for layer in model.modules()
            if multiplies_by_its_weight(layer)
        }
        self.pairs: list[tuple[nn.Module, Quantizer]] = []
        ranges = []
        for layer in layers.values():
            quantizer = layer.weight_quantizer
            if (
                not isinstance(quantizer, Quantizer)
                or quantizer.bits == FLOAT_BITS
                or not isinstance(layer.weight, nn.Parameter)
            ):
                continue
            how = quantizer.learned_step(layer.weight)
            if (
                how is not None
                and how.offset is None
                and quantizer.channel_axis == 0
                and can_quantize_together(layer.weight, how.step)
                and wants_kernel(layer.weight)
            ):
                self.pairs.append((layer, quantizer))
                ranges.append(WeightRange(how.qmin, how.qmax, how.grad_scale))
        self.groups: list[tuple[slice, TogetherQuantizer]] = []
        size = max(1, -(-len(ranges) // groups))
        for start in range(0, len(ranges), size):
            part = slice(start, start + size)
            self.groups.append((part, TogetherQuantizer(ranges[part])))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Quantize now; the layers use it until the end of the context."""
        if not self.pairs:
            yield
            return
        # read anew: a stand-in may have taken the place of a parameter
        weights = [layer.weight for layer, _ in self.pairs]
        quantizers = [quantizer for _, quantizer in self.pairs]
        steps = [
            quantizer.learned_step(weight).step  # type: ignore[union-attr]
            for quantizer, weight in zip(quantizers, weights, strict=True)
        ]
        dtype = _product_dtype(weights[0])
        given = [
            result
            for part, together in self.groups
            for result in together(weights[part], steps[part], dtype)
        ]
        try:
            for quantizer, *result in zip(
                quantizers, weights, given, strict=True
            ):
                quantizer.given = tuple(result)
            yield
        finally:
            for quantizer in quantizers:
                quantizer.given = None


def _product_dtype(weight: torch.Tensor) -> torch.dtype:
    """What a product makes of a float32 operand: autocast may shorten it."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype
