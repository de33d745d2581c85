"""The weights of all layers, quantized together before the network runs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmauxq.layers import QuantLayer
from mmauxq.quantizers import FLOAT_BITS, LearnedStepQuantizer

from .kernels.dispatch import wants_kernel
from .kernels.weights import GroupedQuantizer, WeightRange, can_group


class GroupedWeights:
    """Gives every layer its quantized weight, from one launch for all.

    Values and gradients are those that the layers would compute themselves.
    Only layers that multiply by the weight itself take part, with a learned
    step, float32 weights, and on a GPU; the others quantize on their own.

    A layer that did not run gets no gradient. DDP with
    ``find_unused_parameters`` counts it as used all the same.
    """

    def __init__(self) -> None:
        self.entries: list[_Precomputed] = []
        self.groups: list[tuple[slice, GroupedQuantizer]] = []
        self.in_step = False
        self._key: list | None = None

    @contextmanager
    def active(self, model: nn.Module, groups: int = 1) -> Iterator[None]:
        """Quantize now; layers use it inside, and in the backward pass.

        Args:
            model: Whose quantized layers are meant; calibrated.
            groups: In how many launches. The gradients of a group appear
                together, when the backward pass is through all of its layers:
                with several groups, ranks exchange the first ones meanwhile.
        """
        self._prepare(model, groups)
        if self.entries:
            self._quantize()
        self.in_step = True
        try:
            yield
        finally:
            self.in_step = False

    def _prepare(self, model: nn.Module, groups: int) -> None:
        """Choose the layers, unless nothing changed since the last step."""
        candidates = [
            (layer, codes)
            for layer in model.modules()
            if isinstance(layer, QuantLayer)
            and (codes := _range(layer)) is not None
        ]
        key: list = [(id(layer), codes) for layer, codes in candidates]
        if candidates:
            weight = candidates[0][0].product_weight
            key.append((weight.device, wants_kernel(weight), groups))
        if key == self._key:
            return
        self._key = key
        for entry in self.entries:
            entry.layer.precomputed = None
        self.entries, ranges = [], []
        for layer, codes in candidates:
            weight, step = layer.product_weight, layer.weight_quantizer.step
            if can_group(weight, step) and wants_kernel(weight):
                entry = layer.precomputed = _Precomputed(self, layer)
                self.entries.append(entry)
                ranges.append(codes)
        size = max(1, -(-len(ranges) // groups))
        starts = range(0, len(ranges), size)
        parts = [slice(start, start + size) for start in starts]
        self.groups = [(p, GroupedQuantizer(ranges[p])) for p in parts]

    def _quantize(self) -> None:
        # read anew: the parameters may have been replaced
        weights = [entry.layer.product_weight for entry in self.entries]
        steps = [entry.layer.weight_quantizer.step for entry in self.entries]
        dtype = operand_dtype(weights[0])
        for part, group in self.groups:
            results = group(weights[part], steps[part], dtype)
            each = zip(self.entries[part], weights[part], results, strict=True)
            for entry, weight, result in each:
                entry.weight, entry.result, entry.dtype = weight, result, dtype


class _Precomputed:
    """The quantized weight of one layer."""

    def __init__(self, owner: GroupedWeights, layer: QuantLayer) -> None:
        self.owner, self.layer = owner, layer
        self.weight: Tensor | None = None
        self.result: Tensor | None = None
        self.dtype = torch.float32
        self.in_graph = True

    def __call__(self, weight: Tensor) -> Tensor | None:
        in_step, compiling = self.owner.in_step, torch.compiler.is_compiling()
        in_backward = not compiling and torch._C._current_graph_task_id() != -1
        if (
            weight is not self.weight
            # the weights change between steps
            or not (in_step or in_backward)
            # a region without autocast wants another dtype
            or operand_dtype(weight) != self.dtype
        ):
            return None
        if in_step:
            if not compiling:
                self.in_graph = torch.is_grad_enabled()
        elif not self.in_graph:
            # reentrant checkpointing: the layer ran without gradients, and
            # runs now in a graph of its own
            return None
        return self.result


def _range(layer: QuantLayer) -> WeightRange | None:
    """How the weight is quantized, if by a learned step along axis 0."""
    quantizer, weight = layer.weight_quantizer, layer.product_weight
    if (
        layer.multiplies_by_weight
        and isinstance(quantizer, LearnedStepQuantizer)
        and quantizer.bits != FLOAT_BITS
        and quantizer.offset is None
        and isinstance(weight, nn.Parameter)
        and quantizer.channel_axis == 0
    ):
        scale = quantizer.grad_scale(weight)
        return WeightRange(quantizer.qmin, quantizer.qmax, scale)
    return None


def operand_dtype(operand: Tensor) -> torch.dtype:
    """What a product makes of a float32 operand: autocast may shorten it."""
    device = operand.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return operand.dtype
