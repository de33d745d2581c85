"""Quantizers of a traced graph as ``QuantizeLinear``/``DequantizeLinear``."""

from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor

from mmauxq.errors import UsageError
from mmauxq.quantizers import Quantizer

from .graph import finish, prune
from .lower_activation import lower_activation
from .lower_weight import WeightLowering
from .lowered import Lowered
from .residual_sums import quantize_values
from .trace import DOMAIN


def lower(
    traced: ir.Model,
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
      that a product is followed by its ``QuantizeLinear`` at once, and rounds
      biases to integers (see :mod:`mmauxq.deploy.onnx.integer_bias`).

    Args:
        traced: A graph of :func:`mmauxq.deploy.onnx.trace.trace`; left as it
            is.
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
    model = traced.clone()
    placeholders = [
        (node, node.attributes['name'].as_string())
        for node in model.graph
        if node.domain == DOMAIN
    ]
    for name, count in Counter(name for _, name in placeholders).items():
        if count > 1:
            raise UsageError(
                f'{name}: expected layers that run once in a forward pass, '
                f'got one that runs {count} times'
            )
    result = Lowered()
    quantize_values(model.graph, ranges or {})
    for node, name in placeholders:
        if quantizers[name].role == 'activation':
            lower_activation(node, name, quantizers[name], kernels, result)
    prune(model)  # activation functions that became limits of codes
    weights = WeightLowering(kernels, narrowest, fold, result)
    for node, name in placeholders:
        if quantizers[name].role == 'weight':
            weights.lower(node, name, quantizers[name], operands[name])
    if 'int2' in result.containers.values():
        result.opset = 25
    result.model = finish(model, result.opset)
    return result
