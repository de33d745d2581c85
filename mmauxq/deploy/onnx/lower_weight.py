"""A quantized weight as typed codes, its batch norm folded where exact."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import Tensor

from mmauxq.errors import UsageError
from mmauxq.quantizers import Quantizer

from .graph import (
    PRODUCTS,
    Lowered,
    NewNodes,
    array,
    is_sum,
    name_of,
    only_consumer,
)
from .integer_bias import MOST_LEVELS, PAIR_LIMIT, integer_bias
from .lower_activation import clip_values

TYPES = {'int2': (-2, 1), 'int4': (-8, 7), 'int8': (-128, 127)}
"""Type of codes -> its lowest and highest number."""

PASSED = (
    'Clip', 'Flatten', 'MaxPool', 'Relu', 'Reshape', 'Slice', 'Squeeze',
    'Transpose', 'Unsqueeze',
)  # fmt: skip
"""Operators that a runtime may put behind a quantizer instead of before."""


@dataclass
class _Weight:
    """A quantized weight on its way into the graph.

    Args:
        product: The node that takes the weight.
        limits: Lowest and highest code of the quantizer.
        codes: (out, ...).
        scale: (out,), or (1,) for all channels of a linear layer.
        bias: Of a convolution, (out,).
        unit: Value of 1 in ``bias``, (out,), if that holds integers.
    """

    name: str
    product: ir.Node
    limits: tuple[int, int]
    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None = None
    unit: np.ndarray | None = None


def lower_weight(
    node: ir.Node, quantizer: Quantizer, operand: Tensor, result: Lowered
) -> None:
    """Replace a placeholder by codes of the weight ``operand`` and
    ``DequantizeLinear``, in the form that ``result`` says; notes go there.

    Raises:
        UsageError: If the weight enters anything but one product, or no type
            holds its codes.
    """
    name, grid = name_of(node), quantizer.grid()
    product, transposed = _product_of(node.outputs[0], name)
    weight = _Weight(
        name, product, (grid.qmin, grid.qmax),
        quantizer.codes(operand).numpy(force=True).astype(np.int64),
        grid.scale.numpy(force=True).astype(np.float64),
    )  # fmt: skip
    if product.op_type == 'Conv':
        weight.scale = np.resize(weight.scale, len(weight.codes))
        if len(product.inputs) > 2 and product.inputs[2] is not None:
            weight.bias = array(product.inputs[2]).astype(np.float64)
        if result.weights != 'plain':
            _fold_batch_norm(weight, result)
    kind = result.containers[name] = _narrowest(weight, result)
    if result.weights == 'int8':
        _for_kernel(weight, result)
        _note_saturation(weight, result)
    codes, scale = weight.codes, weight.scale.astype(np.float32)
    if transposed:
        codes = codes.T
        result.transposed.append(name)
    if len(scale) == 1:
        scale = scale.reshape(())
    new = NewNodes(product.graph, name)
    value = new.dequantize(codes, scale, kind, int(transposed))
    if product.op_type != 'Conv' and _why_float(product) is not None:
        # ONNX Runtime would compute the product of a constant of 8 bits or
        # less with MatMulNBits, which rounds the other operand to 8 bits. It
        # knows the constant no more behind a limit without limits.
        value = new.add('Clip', 'float', value)
    product.replace_input_with(1, value)
    product.prepend(new.nodes)
    if weight.bias is not None:
        if weight.unit is None:
            value = new.constant('bias', weight.bias, 'float')
        else:
            new = NewNodes(product.graph, f'{name}.bias')
            value = new.dequantize(weight.bias, weight.unit, 'int32')
            product.prepend(new.nodes)
        product.resize_inputs(3)
        product.replace_input_with(2, value)


def _narrowest(weight: _Weight, result: Lowered) -> str:
    types = list(TYPES) if result.weights == 'typed' else ['int8']
    low = min(weight.codes.min(), weight.limits[0])
    high = max(weight.codes.max(), weight.limits[1])
    for kind in types:
        if TYPES[kind][0] <= low and high <= TYPES[kind][1]:
            return kind
    raise UsageError(
        f'{weight.name}: codes from {low} to {high} fit none of '
        f'{", ".join(types)} (odd codes of DoReFa weights take one bit more '
        'than they have)'
    )


def _fold_batch_norm(weight: _Weight, result: Lowered) -> None:
    """Take a batch norm into codes, scale and bias of its convolution, which
    is exact. A negative slope turns the sign of the codes; the batch norm
    stays where the lowest code would then need a wider type."""
    output = weight.product.outputs[0]
    norm = only_consumer(output)
    if norm is None or norm.op_type != 'BatchNormalization':
        return
    name = norm.outputs[0].name
    gamma, beta, mean, var = (
        array(value).astype(np.float64) for value in norm.inputs[1:]
    )
    # 32 bits, as in a file
    epsilon = np.float32(norm.attributes.get_float('epsilon', 1e-5))
    slope = gamma / np.sqrt(var + epsilon)
    codes = weight.codes
    shape = -1, *[1] * (codes.ndim - 1)
    turned = codes * np.sign(slope).astype(int).reshape(shape)
    low, high = TYPES[_narrowest(weight, result)]
    if turned.max() > high or turned.min() < low:
        result.kept[name] = (
            f'{weight.name}: a negative slope turns code {codes.min()} '
            f'into {-codes.min()}, which the type does not hold'
        )
        return
    zeroed = slope == 0
    bias = 0 if weight.bias is None else weight.bias
    weight.codes, weight.bias = turned, (bias - mean) * slope + beta
    weight.scale = np.where(zeroed, 1, weight.scale * np.abs(slope))
    norm.outputs[0].replace_all_uses_with(output, True)
    norm.graph.remove(norm, safe=True)
    output.name = name
    result.zeroed[weight.name] = zeroed
    result.folded.append(name)


def _for_kernel(weight: _Weight, result: Lowered) -> None:
    """Give an integer kernel what it takes, if one can run."""
    product = weight.product
    layer = weight.name.rpartition('.')[0]
    reason = _why_float(product)
    if reason is not None:
        _keep_float(product, layer, reason, result)
    if reason or product.op_type != 'Conv' or weight.bias is None:
        return
    source = product.inputs[0].producer()
    after = only_consumer(product.outputs[0])
    step, out_step = array(source.inputs[1]), array(after.inputs[1])
    outputs = _limits(after)
    fitted = integer_bias(
        weight.codes, weight.scale, weight.bias, float(step),
        (*_limits(source), int(array(source.inputs[2]))),
        float(out_step), outputs,
    )  # fmt: skip
    inexact = int((~fitted.exact).sum())
    if np.abs(fitted.bias).max(initial=0) > 2**30:
        reason = 'its bias does not fit 32 bits'
    elif inexact and outputs[1] - outputs[0] < MOST_LEVELS:
        reason = (
            f'{inexact} of its channels have no integer bias that gives the '
            'same codes'
        )
    if reason is not None:
        _keep_float(product, layer, reason, result)
        return
    weight.codes, weight.scale = fitted.codes, fitted.scale
    # the unit of an accumulator is the product of both scales
    weight.bias = fitted.bias
    weight.unit = step * fitted.scale.astype(np.float32)
    result.exact_channels += len(fitted.exact) - inexact
    if inexact:
        result.rounded[layer] = inexact
        following = after.outputs[0].name.removesuffix('.codes')
        result.reach[following] = fitted.reach


def _note_saturation(weight: _Weight, result: Lowered) -> None:
    """Note a layer for which kernels without dot-product instructions, which
    add pairs of products in 16 bits, may not be exact."""
    layer = weight.name.rpartition('.')[0]
    if layer in result.float_layers:
        return
    source = weight.product.inputs[0].producer()
    largest = _limits(source)[1] + int(array(source.inputs[2]))
    if 2 * largest * int(np.abs(weight.codes).max()) > PAIR_LIMIT:
        result.saturating.append(layer)


def _keep_float(
    product: ir.Node, layer: str, reason: str, result: Lowered
) -> None:
    """Note why a layer runs in float, and see that it does.

    A runtime moves the quantizer in front of operators that only move values
    or take the greatest, up to a convolution, which it then gives to an
    integer kernel with a rounded bias. Limits in front of the quantizer, which
    the codes have in any case, keep it where it is.
    """
    result.float_layers[layer] = reason
    value = product.outputs[0]
    after = only_consumer(value)
    while after is not None and after.op_type in PASSED:
        value = after.outputs[0]
        after = only_consumer(value)
    if (
        product.op_type == 'Conv'
        and after is not None
        and after.op_type == 'QuantizeLinear'
        and not (scale := array(after.inputs[1])).ndim
    ):
        new = NewNodes(product.graph, f'{value.name}.output')
        clipped = clip_values(new, value, scale, *_limits(after))
        after.prepend(new.nodes)
        after.replace_input_with(0, clipped)


def _product_of(value: ir.Value, name: str) -> tuple[ir.Node, bool]:
    """The product that takes a weight, and whether it takes the transpose."""
    product, transposed = only_consumer(value), False
    if (
        product is not None
        and product.op_type == 'Transpose'
        and tuple(product.attributes.get_ints('perm')) == (1, 0)
    ):
        value, transposed = product.outputs[0], True
        product = only_consumer(value)
    elif product is not None and product.attributes.get_int('transB', 0):
        # the exporter's form of a linear layer whose biases are zero
        product.attributes['transB'] = ir.AttrInt64('transB', 0)
        transposed = True
    if (
        product is None
        or product.op_type not in PRODUCTS
        or product.inputs[1] is not value
        or product.attributes.get_int('transB', 0)
    ):
        kind = 'several operators' if product is None else product.op_type
        raise UsageError(
            f'{name}: expected the quantized weight to go to one of '
            f'{", ".join(PRODUCTS)}, alone, got {kind}'
        )
    return product, transposed


def _why_float(product: ir.Node) -> str | None:
    """What keeps a quantized product from an integer kernel."""
    source = product.inputs[0].producer()
    if source is not None and source.name.endswith('.unshifted'):
        return 'its input has an offset (LSQPlus)'
    if source is None or source.op_type != 'DequantizeLinear':
        return 'its input is not quantized'
    if array(source.inputs[1]).ndim:
        return 'its input has a scale for each channel'
    if array(source.inputs[2]).itemsize > 1:
        return 'its input has more than 8 bits'
    if product.op_type != 'Conv':
        return None  # integer kernels of matrices write float as well
    takers = product.outputs[0].consumers()
    kinds = [node.op_type for node in takers]
    if kinds != ['QuantizeLinear']:
        names = ', '.join(sorted(set(kinds))) or 'the output'
        helps = ''
        if any(map(is_sum, takers)):
            helps = ', which --residual int8 quantizes'
        return f'its result goes on in float, to {names}{helps}'
    if array(takers[0].inputs[1]).ndim:
        return 'its output has a scale for each channel'
    return None


def _limits(pair: ir.Node) -> tuple[int, int]:
    """Lowest and highest code of a ``Quantize-`` or ``DequantizeLinear``."""
    if pair.op_type == 'QuantizeLinear':
        clip = only_consumer(pair.outputs[0])
    else:
        clip = pair.inputs[0].producer()
    zero, low, high = int(array(pair.inputs[2])), 0, 255
    if clip is not None and clip.op_type == 'Clip':
        low, high = (int(array(limit)) for limit in clip.inputs[1:])
    return low - zero, high - zero
