"""Quantizers of brevitas, as its injectors make them; imports brevitas."""

import torch
from brevitas.core.scaling import (
    ParameterFromRuntimeStatsScaling,
    ScalingImplType,
)
from brevitas.inject import ExtendedInjector
from brevitas.nn import QuantConv2d, QuantIdentity
from brevitas.quant import (
    Int8WeightPerTensorFloat,
    Int8WeightPerTensorFloatMSE,
    Uint8ActPerTensorFloat,
    Uint8ActPerTensorFloatMSE,
)
from torch import Tensor, nn


class ResumedStats(ParameterFromRuntimeStatsScaling):
    """That of brevitas, with the statistics so far in the state dict.

    With brevitas' own state dict, a run that is resumed while it collects
    statistics would end to collect them.
    """

    @classmethod
    def of(cls, scaling: ParameterFromRuntimeStatsScaling) -> None:
        """Make ``scaling`` one of these."""
        # brevitas builds no class whose constructor takes any arguments
        scaling.__class__ = cls
        scaling.register_buffer('steps', torch.tensor(scaling.counter))

    def training_forward(self, stats_input: Tensor, threshold: Tensor):
        """That of brevitas; its counter is a plain number."""
        scale = super().training_forward(stats_input, threshold)
        self.steps.fill_(self.counter)
        return scale

    state_dict = nn.Module.state_dict  # that of brevitas drops the average

    def _load_from_state_dict(self, *args) -> None:
        nn.Module._load_from_state_dict(self, *args)
        if not self.steps.is_meta:  # a checkpoint is checked without data
            self.counter = int(self.steps)


class LearnedWeight(Int8WeightPerTensorFloat):
    """Narrow range, from the largest magnitude."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS


LearnedActivation = Uint8ActPerTensorFloat
"""From percentiles of the first 300 steps."""


class BestWeight(Int8WeightPerTensorFloatMSE):
    """All levels, from the least squared error."""

    narrow_range = False


class BestActivation(Uint8ActPerTensorFloatMSE):
    """From the least squared error on the first batch."""

    collect_stats_steps = 1


def weight_quantizer(kind: type[ExtendedInjector], bits: int) -> nn.Module:
    """Of a layer's weight; returns (value, scale, zero point, bits)."""
    # The layer only says what brevitas asks it. Not the proxy is taken: it
    # makes new parameters, unknown to the optimizer, when a state is loaded.
    with torch.random.fork_rng(devices=[]):
        layer = QuantConv2d(
            1, 1, 1, bias=False, weight_quant=kind, weight_bit_width=bits
        )
    return layer.weight_quant.tensor_quant


def activation_quantizer(kind: type[ExtendedInjector], bits: int) -> nn.Module:
    """Of activations; returns (value, scale, zero point, bits)."""
    layer = QuantIdentity(act_quant=kind, bit_width=bits)
    quantizer = layer.act_quant.fused_activation_quant_proxy.tensor_quant
    ResumedStats.of(quantizer.scaling_impl)
    return quantizer
