"""A quantized classifier as one ONNX model."""

import copy
from collections.abc import Sequence

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from mmauxq.layers import restore
from mmauxq.quantizers import named_quantizers

from ..weight_operands import weight_operands
from . import runtime
from .graph import finish
from .lower import lower
from .lowered import Lowered
from .residual_sums import residual_values
from .trace import trace


def to_onnx(
    architecture: nn.Module,
    images: Tensor,
    weights: str = 'typed',
    residual: str = 'float',
    traced: ir.Model | None = None,
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
        traced: The graph of ``architecture``, to trace it once for several
            forms; left as it is.

    Raises:
        UsageError: If the network cannot be expressed.
    """
    quantizers = dict(named_quantizers(architecture))
    operands = weight_operands(architecture, images[:1])
    if traced is None:
        traced = trace(architecture, images.shape[1:])
    names = residual_values(traced.graph) if residual == 'int8' else []
    ranges = None
    if names:
        plain = lower(
            traced, quantizers, operands, narrowest='int8', fold=False
        )
        ranges = runtime.value_ranges(plain.model, names, images.numpy())
    kernels = weights == 'int8'
    lowered = lower(
        traced, quantizers, operands, kernels,
        'int8' if kernels else 'int2', ranges,
    )  # fmt: skip
    lowered.weights = weights
    return lowered


def float_onnx(
    architecture: nn.Module, shape: Sequence[int]
) -> onnx.ModelProto:
    """The same network without quantizers, to compare with.

    Args:
        architecture: Quantized; left as it is.
        shape: (C, H, W) of an image.
    """
    network = restore(copy.deepcopy(architecture))
    with torch.no_grad():
        return finish(trace(network, shape), 21)
