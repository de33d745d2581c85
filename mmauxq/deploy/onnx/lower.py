"""Quantizers of a traced graph as ``QuantizeLinear``/``DequantizeLinear``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmauxq.errors import UsageError
from mmauxq.quantizers import Quantizer

from .graph import Graph, attributes
from .lower_activation import lower_activation
from .lower_weight import lower_weight
from .residual import quantize_values
from .trace import DOMAIN

OPSETS = {'int2': 25, 'int4': 21, 'int8': 21}


@dataclass
class Lowered:
    """An ONNX model and what had to be decided on the way.

    Args:
        model: An ``onnx.ModelProto``.
        opset: Its opset.
        weights: ``'typed'`` or ``'int8'``, as it came out.
        containers: Weight quantizer -> type that holds its codes.
        folded: Names of batch norms folded into weights and biases.
        kept: Batch norm -> why it is still there.
        codes: Activation quantizer -> (value with its codes, code of zero).
        float_layers: Quantized layer -> why no integer kernel can run it.
        exact_channels: Output channels whose whole bias changes no code.
        rounded: Layer -> number of channels whose bias is rounded: the codes
            after it may differ from PyTorch's by one, near a threshold.
        reach: Activation quantizer -> how near, in steps, because of that.
    """

    model: Any
    opset: int = 21
    weights: str = ''
    containers: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    codes: dict[str, tuple[str, int]] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)
    exact_channels: int = 0
    rounded: dict[str, int] = field(default_factory=dict)
    reach: dict[str, float] = field(default_factory=dict)


def lower(
    traced: Any,
    quantizers: Mapping[str, Quantizer],
    operands: Mapping[str, Tensor],
    kernels: bool = False,
    narrowest: str = 'int2',
    ranges: Mapping[str, tuple[float, float]] | None = None,
    fold: bool = True,
) -> Lowered:
    """Replace the placeholders of a traced graph.

    Two forms compute the same codes up to the rounding of a float:

    * the plain form (``kernels=False``) clips, quantizes and dequantizes
      activations and leaves the products to float arithmetic, weights in the
      narrowest type that holds their codes;
    * the form for integer kernels clips the codes instead of the values, so
      that a product is followed by its ``QuantizeLinear`` at once, and
      makes biases whole (see :mod:`mmauxq.deploy.onnx.whole_bias`).

    Args:
        traced: Of :func:`mmauxq.deploy.onnx.trace.trace`; changed.
        quantizers: Those that the placeholders name.
        operands: Weight quantizer -> its input.
        kernels: Which form.
        narrowest: ``'int2'``, ``'int4'`` or ``'int8'``: the smallest type for
            weights.
        ranges: Value of the graph -> its least and greatest value on sample
            images; these are quantized to 8 bits as well (the residual sum).
        fold: Whether to fold batch norms where that is exact.

    Raises:
        UsageError: If a layer cannot be expressed.
    """
    graph = Graph(traced)
    placeholders = [node for node in graph.nodes if node.domain == DOMAIN]
    names = [attributes(node)['name'].decode() for node in placeholders]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f'{name}: is used {names.count(name)} times in one forward '
                'pass; exported are layers that run once'
            )
    result = Lowered(traced)
    if ranges:
        quantize_values(graph, ranges)
    for node, name in zip(placeholders, names, strict=True):
        if quantizers[name].role == 'activation':
            lower_activation(
                graph, node, name, quantizers[name], kernels, result
            )
    graph.prune()  # activation functions that became limits of codes
    for node, name in zip(placeholders, names, strict=True):
        if quantizers[name].role == 'weight':
            lower_weight(
                graph, node, name, quantizers[name], operands[name],
                narrowest, kernels, fold, result,
            )  # fmt: skip
    result.opset = max(
        [21, *(OPSETS[kind] for kind in result.containers.values())]
    )
    result.model = graph.finish(result.opset)
    return result
