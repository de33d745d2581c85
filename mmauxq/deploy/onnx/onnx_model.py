"""A quantized classifier as one ONNX model."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmauxq.layers import restore
from mmauxq.quantizers import named_quantizers

from ..weight_operands import weight_operands
from . import runtime
from .graph import Graph
from .lower import Lowered, lower
from .residual import residual_values
from .trace import trace


def to_onnx(
    architecture: nn.Module,
    images: Tensor,
    weights: str = 'typed',
    residual: str = 'float',
    traced: Any = None,
) -> Lowered:
    """Export F.

    Args:
        architecture: Quantized, calibrated, in evaluation mode.
        images: (N, C, H, W), preprocessed; the shape counts, and with
            ``residual='int8'`` the ranges.
        weights: ``'typed'``: the narrowest ONNX type, float arithmetic;
            ``'int8'``: a form that runtimes give to integer kernels.
        residual: ``'float'`` or, with int8 weights, ``'int8'``: residual sums
            and what enters them are quantized to 8 bits, so that every
            product can be written by an integer kernel.
        traced: The traced graph, if it is there already; changed.

    Raises:
        UsageError: If the network cannot be expressed.
    """
    quantizers = dict(named_quantizers(architecture))
    operands = weight_operands(architecture, images[:1])
    if traced is None:
        traced = trace(architecture, images.shape[1:])
    kernels = weights == 'int8'
    ranges = None
    names = residual_values(Graph(copy.deepcopy(traced)))
    if residual == 'int8' and names:
        plain = lower(
            copy.deepcopy(traced), quantizers, operands,
            narrowest='int8', fold=False,
        )  # fmt: skip
        ranges = runtime.value_ranges(plain.model, names, images.numpy())
    return lower(
        traced,
        quantizers,
        operands,
        kernels=kernels,
        narrowest='int8' if kernels else 'int2',
        ranges=ranges,
    )


def float_onnx(architecture: nn.Module, shape: Sequence[int]) -> Any:
    """The same network without quantizers, to compare with."""
    network = restore(copy.deepcopy(architecture))
    with torch.no_grad():
        return Graph(trace(network, shape)).finish(21)
