"""A quantized weight as typed codes, its batch norm folded where exact."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mmauxq.errors import UsageError
from mmauxq.quantizers import Grid, Quantizer

from .graph import NARROW, PRODUCTS, Graph, attributes
from .lower_activation import array, clip_values
from .whole_bias import MOST_LEVELS, WholeBias, whole_bias

if TYPE_CHECKING:
    from .lower import Lowered

RANGES = {'int2': (-2, 1), 'int4': (-8, 7), 'int8': (-128, 127)}


def lower_weight(
    graph: Graph,
    node: Any,
    name: str,
    quantizer: Quantizer,
    operand: Tensor,
    narrowest: str,
    kernels: bool,
    fold: bool,
    result: 'Lowered',
) -> None:
    """Put codes and ``DequantizeLinear`` in a weight quantizer's place.

    Args:
        graph: Changed.
        node: The placeholder.
        name: Of the quantizer.
        quantizer: The quantizer.
        operand: The weight that it quantizes.
        narrowest: Smallest type for the codes.
        kernels: Whether biases become whole.
        fold: Whether to fold a batch norm that follows.
        result: Notes what was decided.

    Raises:
        UsageError: If the weight enters something else than one product, or
            no type holds its codes.
    """
    grid = quantizer.grid()
    codes = array(quantizer.codes(operand)).astype(np.int64)
    scale = array(grid.scale).astype(np.float64)
    product, axis = _product_of(graph, node, name)
    if axis:
        codes = codes.T
    bias = None
    if product.op_type == 'Conv':
        scale = np.broadcast_to(scale, (len(codes),)).copy()
        codes, scale, bias = _fold_batch_norm(
            graph, product, name, codes, scale, grid, narrowest, fold, result
        )
    elif product.op_type == 'Gemm' and len(product.input) > 2:
        bias = graph.array(product.input[2])
    kind = _narrowest_type(name, codes, grid, narrowest)
    if kernels:
        codes, scale, bias = _for_kernel(
            graph, product, name, codes, scale, bias, result
        )
    if len(scale) == 1:
        scale = scale.reshape(())
    scale = scale.astype(np.float32)
    graph.constant(f'{name}.codes', codes, kind)
    graph.constant(f'{name}.scale', scale)
    graph.constant(f'{name}.zero', np.zeros(scale.shape, np.int64), kind)
    dequantize = graph.node(
        'DequantizeLinear',
        [f'{name}.codes', f'{name}.scale', f'{name}.zero'],
        f'{name}.value',
        **({'axis': axis} if scale.ndim else {}),
    )
    graph.insert([dequantize], product)
    result.containers[name] = kind
    product.input[1] = f'{name}.value'
    _add_bias(graph, product, name, bias)


def _product_of(graph: Graph, node: Any, name: str) -> tuple[Any, int]:
    """The product that takes a weight, and the axis of its channels there."""
    axis, value = 0, node.output[0]
    product = graph.only_consumer(value)
    if product is not None and product.op_type == 'Transpose':
        order = list(attributes(product)['perm'])
        if order == [1, 0]:
            axis, value = 1, product.output[0]
            product = graph.only_consumer(value)
    if (
        product is None
        or product.op_type not in PRODUCTS
        or product.input[1] != value
        or attributes(product).get('transB')
    ):
        kind = 'several operators' if product is None else product.op_type
        raise UsageError(
            f'{name}: the quantized weight goes to {kind}; exported are '
            f'{", ".join(PRODUCTS)} with a weight of their own'
        )
    return product, axis


def _narrowest_type(
    name: str, codes: np.ndarray, grid: Grid, narrowest: str
) -> str:
    low, high = min(codes.min(), grid.qmin), max(codes.max(), grid.qmax)
    kinds = list(RANGES)[list(RANGES).index(narrowest) :]
    kinds = [kind for kind in kinds if kind in NARROW]
    for kind in kinds:
        if RANGES[kind][0] <= low and high <= RANGES[kind][1]:
            return kind
    raise UsageError(
        f'{name}: codes from {low} to {high} fit none of {", ".join(kinds)} '
        '(odd codes of DoReFa weights take one bit more than they have)'
    )


def _fold_batch_norm(
    graph: Graph,
    conv: Any,
    name: str,
    codes: np.ndarray,
    scale: np.ndarray,
    grid: Grid,
    narrowest: str,
    fold: bool,
    result: 'Lowered',
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes, scale and bias of the convolution and what follows it.

    A batch norm has one slope and one shift for each channel, as a quantized
    convolution has a scale and a bias, so that folding is exact. A negative
    slope turns the sign of the codes; two's complement has one code more on
    the negative side, and where that one would need a wider type the batch
    norm stays.
    """
    bias = None
    if len(conv.input) > 2 and conv.input[2]:
        bias = graph.array(conv.input[2]).astype(np.float64)
    norm = graph.only_consumer(conv.output[0])
    if norm is None or norm.op_type != 'BatchNormalization' or not fold:
        return codes, scale, bias
    gamma, beta, mean, var = (
        graph.array(n).astype(np.float64) for n in norm.input[1:]
    )
    slope = gamma / np.sqrt(var + attributes(norm).get('epsilon', 1e-5))
    sign = np.where(slope < 0, -1, 1).reshape(-1, *[1] * (codes.ndim - 1))
    turned = codes * sign
    limit = RANGES[_narrowest_type(name, codes, grid, narrowest)]
    if turned.max() > limit[1] or turned.min() < limit[0]:
        result.kept[norm.output[0]] = (
            f'{name}: a negative slope turns code {codes.min()} into '
            f'{-codes.min()}, which the type does not hold'
        )
        return codes, scale, bias
    dead = slope == 0
    turned[dead] = 0
    scale = np.where(dead, 1, scale * np.abs(slope))
    bias = (0 if bias is None else bias) - mean
    bias = bias * slope + beta
    output = norm.output[0]
    graph.remove(norm)
    conv.output[0] = output
    result.folded.append(output)
    return turned, scale, bias


def _for_kernel(
    graph: Graph,
    product: Any,
    name: str,
    codes: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray | None,
    result: 'Lowered',
) -> tuple[np.ndarray, np.ndarray, np.ndarray | WholeBias | None]:
    """Weights and bias as an integer kernel takes them, if one can run."""
    layer = name.rpartition('.')[0]
    reason = _why_float(graph, product)
    if reason is not None:
        result.float_layers[layer] = reason
        return codes, scale, bias
    if product.op_type != 'Conv' or bias is None:
        return codes, scale, bias
    source = graph.producer(product.input[0])
    after = graph.only_consumer(product.output[0])
    step, out_step = graph.array(source.input[1]), graph.array(after.input[1])
    low, high = _limits(graph, source.input[0], source)
    outputs = _limits(graph, after.output[0], after)
    whole = whole_bias(
        codes, scale, bias, float(step),
        (low, high, int(graph.array(source.input[2]))),
        float(out_step), outputs,
    )  # fmt: skip
    if np.abs(whole.bias).max(initial=0) > 2**30:
        result.float_layers[layer] = 'its bias does not fit 32 bits'
    elif whole.exact.all():
        result.exact_channels += len(codes)
        return whole.codes, whole.scale, whole
    elif outputs[1] - outputs[0] >= MOST_LEVELS:
        result.exact_channels += int(whole.exact.sum())
        result.rounded[layer] = int((~whole.exact).sum())
        following = after.output[0].removesuffix('.codes')
        result.reach[following] = whole.reach
        return whole.codes, whole.scale, whole
    else:
        result.float_layers[layer] = (
            f'{int((~whole.exact).sum())} of its channels have no whole bias '
            'that gives the same codes'
        )
    # Something between product and quantizer keeps runtimes from rounding
    # the bias; the codes are clipped so anyhow.
    clips = clip_values(
        graph, f'{name}.output', product.output[0],
        out_step, *outputs,
    )  # fmt: skip
    graph.insert_after(clips, product)
    after.input[0] = clips[-1].output[0]
    return codes, scale, bias


def _why_float(graph: Graph, product: Any) -> str | None:
    """What keeps a quantized product from an integer kernel."""
    source = graph.producer(product.input[0])
    if source is not None and source.name.endswith('.unshifted'):
        return 'its input has an offset (LSQPlus)'
    if source is None or source.op_type != 'DequantizeLinear':
        return 'its input is not quantized'
    if graph.array(source.input[1]).ndim:
        return 'its input has a scale for each channel'
    if product.op_type != 'Conv':
        return None  # integer kernels of matrices write float as well
    takers = graph.consumers(product.output[0])
    if len(takers) == 1 and takers[0].op_type == 'QuantizeLinear':
        if graph.array(takers[0].input[1]).ndim:
            return 'its output has a scale for each channel'
        return None
    kinds = sorted({node.op_type for node in takers}) or ['the output']
    return f'its result goes on in float, to {", ".join(kinds)}'


def _limits(graph: Graph, codes: str, pair: Any) -> tuple[int, int]:
    """Lowest and highest code of a Quantize/DequantizeLinear."""
    zero = int(graph.array(pair.input[2]))
    clip = graph.producer(codes)
    if pair.op_type == 'QuantizeLinear':
        clip = graph.only_consumer(codes)
    low, high = 0, 255
    if clip is not None and clip.op_type == 'Clip':
        low, high = (int(graph.array(n)) for n in clip.input[1:3])
    return low - zero, high - zero


def _add_bias(
    graph: Graph,
    product: Any,
    name: str,
    bias: np.ndarray | WholeBias | None,
) -> None:
    if bias is None:
        return
    entry = f'{name}.bias'
    if isinstance(bias, WholeBias):
        # its unit is the product of the scales of input and weight
        source = graph.producer(product.input[0])
        unit = graph.array(source.input[1]) * bias.scale.astype(np.float32)
        parts = [f'{entry}.{p}' for p in ('codes', 'scale', 'zero')]
        graph.constant(parts[0], bias.bias, 'int32')
        graph.constant(parts[1], unit)
        graph.constant(parts[2], np.zeros(unit.shape), 'int32')
        entry = f'{entry}.value'
        graph.insert(
            [graph.node('DequantizeLinear', parts, entry, axis=0)], product
        )
    else:
        graph.constant(entry, bias.astype(np.float32))
    product.input[:] = [*product.input[:2], entry]
