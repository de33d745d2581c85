"""Quantizers of a traced graph as ``QuantizeLinear``/``DequantizeLinear``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.quantizers import Quantizer, named_quantizers

from .graph import Graph, attributes
from .requantize import exact_line
from .trace import DOMAIN

OPSETS = {'int2': 25, 'int4': 21, 'int8': 21}
RANGES = {'int2': (-2, 1), 'int4': (-8, 7), 'int8': (-128, 127)}
PRODUCTS = ('Conv', 'Gemm', 'MatMul')


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
        float_outputs: Quantized layers whose product is not followed by a
            quantizer, so that no integer kernel can write its result.
        exact_channels: Output channels whose whole bias changes no code.
        rounded_channels: Those for which there is none: a code next to a
            rounding threshold may differ by one.
    """

    model: Any
    opset: int
    weights: str = ''
    containers: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    codes: dict[str, tuple[str, int]] = field(default_factory=dict)
    float_outputs: list[str] = field(default_factory=list)
    exact_channels: int = 0
    rounded_channels: int = 0


@torch.no_grad()
def weight_operands(
    architecture: nn.Module, image: Tensor
) -> dict[str, Tensor]:
    """What reaches each weight quantizer in a forward pass."""
    operands: dict[str, Tensor] = {}
    handles = [
        quantizer.register_forward_pre_hook(
            lambda _, args, name=name: operands.update({name: args[0]})
        )
        for name, quantizer in named_quantizers(architecture)
        if quantizer.role == 'weight'
    ]
    try:
        architecture(image, mode='tensor')
    finally:
        for handle in handles:
            handle.remove()
    return operands


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
      quantizes biases to int32. Weight codes are spread over int8 by a whole
      factor, which makes the unit of the bias as much finer.

    Args:
        traced: Of :func:`mmauxq.export.trace.trace`; changed.
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
    names = {
        id(node): attributes(node)['name'].decode()
        for node in graph.nodes
        if node.domain == DOMAIN
    }
    result = Lowered(traced, 21)
    if ranges:
        _quantize_values(graph, ranges)
    placeholders = [node for node in graph.nodes if id(node) in names]
    for node in placeholders:
        name = names[id(node)]
        if quantizers[name].role == 'activation':
            _lower_activation(graph, node, name, quantizers, kernels, result)
    graph.prune()  # activation functions that became limits of codes
    for node in placeholders:
        name = names[id(node)]
        if quantizers[name].role == 'weight':
            _lower_weight(
                graph, node, name, quantizers[name], operands[name],
                narrowest, kernels, fold, result,
            )  # fmt: skip
    result.opset = max(
        [21, *(OPSETS[kind] for kind in result.containers.values())]
    )
    result.model = graph.finish(result.opset)
    return result


def _array(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _lower_activation(
    graph: Graph,
    node: Any,
    name: str,
    quantizers: Mapping[str, Quantizer],
    kernels: bool,
    result: Lowered,
) -> None:
    quantizer = quantizers[name]
    grid = quantizer.grid()
    source, output = node.input[0], node.output[0]
    axis = {}
    scale = _array(grid.scale).astype(np.float32)
    offset = None if grid.offset is None else _array(grid.offset)
    spread = scale
    if quantizer.num_channels is None:
        scale = scale.reshape(())
        spread = scale
        offset = None if offset is None else offset.reshape(())
    else:
        axis = {'axis': quantizer.channel_axis}
        if quantizer.channel_axis == 1:
            spread = scale.reshape(-1, 1, 1)
            offset = None if offset is None else offset.reshape(-1, 1, 1)
    low, high = grid.qmin, grid.qmax
    # The integer kernels want uint8; a signed code is shifted to fit.
    kind = 'int8' if grid.signed and not kernels else 'uint8'
    zero = 128 if grid.signed and kernels else 0
    type_range = (-128, 127) if kind == 'int8' else (0, 255)
    new = []
    if offset is not None:
        graph.constant(f'{name}.offset', offset.astype(np.float32))
        new.append(
            graph.node('Sub', [source, f'{name}.offset'], f'{name}.shifted')
        )
        source = f'{name}.shifted'
    elif kernels:
        source, low, high = _absorb_clips(graph, source, scale, low, high)
    full = (low + zero, high + zero) == type_range
    if not kernels:
        # Rounding is monotone: to clip before it is to clip after it. This
        # also keeps runtimes from rounding the bias for an integer kernel.
        for op, bound in (('Max', low), ('Min', high)):
            limit = f'{name}.{op.lower()}'
            graph.constant(limit, (spread * bound).astype(np.float32))
            new.append(graph.node(op, [source, limit], f'{limit}ed'))
            source = f'{limit}ed'
    graph.constant(f'{name}.scale', scale)
    graph.constant(f'{name}.zero', np.full(scale.shape, zero), kind)
    codes = f'{name}.codes'
    scales = [f'{name}.scale', f'{name}.zero']
    new.append(graph.node('QuantizeLinear', [source, *scales], codes, **axis))
    if not full and kernels:
        graph.constant(f'{name}.low', np.array(low + zero), kind)
        graph.constant(f'{name}.high', np.array(high + zero), kind)
        new.append(
            graph.node(
                'Clip',
                [codes, f'{name}.low', f'{name}.high'],
                f'{name}.clipped',
            )
        )
        codes = f'{name}.clipped'
    value = f'{name}.value'
    new.append(graph.node('DequantizeLinear', [codes, *scales], value, **axis))
    if offset is not None:
        new.append(
            graph.node('Add', [value, f'{name}.offset'], f'{name}.unshifted')
        )
        value = f'{name}.unshifted'
    result.codes[name] = (codes, zero)
    graph.insert(new, node)
    graph.remove(node)
    graph.redirect(output, value)


def _absorb_clips(
    graph: Graph, source: str, scale: np.ndarray, low: int, high: int
) -> tuple[str, int, int]:
    """Turn activation functions that clip into limits of the codes.

    ``round(min(x, a) / s) = min(round(x / s), round(a / s))``: exact, and the
    quantizer then follows the product at once.
    """
    if scale.ndim:
        return source, low, high
    while (producer := graph.producer(source)) is not None:
        if producer.op_type == 'Relu':
            low = max(low, 0)
        elif producer.op_type == 'Clip':
            limits = [graph.array(n) if n else None for n in producer.input]
            if any(
                value is None and name
                for name, value in zip(
                    producer.input[1:], limits[1:], strict=True
                )
            ):
                break
            if len(limits) > 1 and limits[1] is not None:
                low = max(low, int(np.rint(np.float32(limits[1]) / scale)))
            if len(limits) > 2 and limits[2] is not None:
                high = min(high, int(np.rint(np.float32(limits[2]) / scale)))
        else:
            break
        source = producer.input[0]
    return source, low, max(high, low)


def _lower_weight(
    graph: Graph,
    node: Any,
    name: str,
    quantizer: Quantizer,
    operand: Tensor,
    narrowest: str,
    kernels: bool,
    fold: bool,
    result: Lowered,
) -> None:
    grid = quantizer.grid()
    codes = _array(quantizer.codes(operand)).astype(np.int64)
    scale = _array(grid.scale).astype(np.float64)
    value = node.output[0]
    axis = 0
    product = graph.only_consumer(value)
    if product is not None and product.op_type == 'Transpose':
        order = attributes(product)['perm']
        codes = codes.transpose(order)
        axis = list(order).index(0)
        value = product.output[0]
        product = graph.only_consumer(value)
    if product is None or product.op_type not in PRODUCTS:
        kind = 'several operators' if product is None else product.op_type
        raise UsageError(
            f'{name}: the quantized weight goes to {kind}; exported are '
            f'{", ".join(PRODUCTS)} with a weight of their own'
        )
    channels = codes.shape[axis]
    bias = None
    if product.op_type == 'Conv':
        scale = np.broadcast_to(scale, (channels,)).copy()
        codes, scale, bias = _fold_batch_norm(
            graph, product, name, codes, scale, grid, narrowest, fold, result
        )
    elif product.op_type == 'Gemm' and len(product.input) > 2:
        bias = graph.array(product.input[2])
    low, high = min(codes.min(), grid.qmin), max(codes.max(), grid.qmax)
    order = list(RANGES)[list(RANGES).index(narrowest) :]
    kind = next(
        (k for k in order if RANGES[k][0] <= low and high <= RANGES[k][1]),
        None,
    )
    if kind is None:
        raise UsageError(
            f'{name}: codes from {low} to {high} fit none of '
            f'{", ".join(order)} (odd codes of DoReFa weights take one bit '
            'more than they have)'
        )
    if kernels:
        codes, scale, bias = _whole_biases(
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
    _add_bias(graph, product, name, bias, scale)
    if _followed_by(graph, product) is None:
        result.float_outputs.append(name.rpartition('.')[0])


def _fold_batch_norm(
    graph: Graph,
    conv: Any,
    name: str,
    codes: np.ndarray,
    scale: np.ndarray,
    grid: Any,
    narrowest: str,
    fold: bool,
    result: Lowered,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
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
    limit = RANGES['int8']
    if narrowest != 'int8':  # do not widen the type for it
        limit = next(
            r
            for kind, r in RANGES.items()
            if kind >= narrowest and r[0] <= grid.qmin and grid.qmax <= r[1]
        )
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


def _followed_by(graph: Graph, product: Any) -> Any:
    """The ``QuantizeLinear`` that alone takes a product, or ``None``."""
    after = graph.only_consumer(product.output[0])
    if after is None or after.op_type != 'QuantizeLinear':
        return None
    return after


@dataclass
class _Whole:
    """A bias in whole units of the accumulator."""

    codes: np.ndarray
    unit: np.ndarray


def _whole_biases(
    graph: Graph,
    product: Any,
    name: str,
    codes: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray | None,
    result: Lowered,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | _Whole | None]:
    """Weights and bias as an integer kernel takes them."""
    source = graph.producer(product.input[0])
    after = _followed_by(graph, product)
    if (
        bias is None
        or product.op_type != 'Conv'
        or after is None
        or source is None
        or source.op_type != 'DequantizeLinear'
    ):
        return codes, scale, bias
    step = graph.array(source.input[1]).astype(np.float64)
    out_step = graph.array(after.input[1]).astype(np.float64)
    if step.ndim or out_step.ndim:
        return codes, scale, bias
    limits = _clip_of(graph, source)
    low, high = _clip_of_next(graph, after)
    zero = int(graph.array(source.input[2]))
    small, large = limits[0] - zero, limits[1] - zero
    whole = np.zeros(len(codes))
    codes, scale = codes.copy(), scale.copy()
    for c, row in enumerate(codes):
        most = max(int(np.abs(row).max()), 1)
        factor = max(127 // most, 1)
        unit = step * scale[c]
        positive, negative = row[row > 0].sum(), row[row < 0].sum()
        reach = (
            int(positive * small + negative * large),
            int(positive * large + negative * small),
        )
        if small > 0 or large < 0:  # padding adds zeros
            reach = (min(reach[0], 0), max(reach[1], 0))
        line = None
        if high - low <= 16:
            line = exact_line(
                unit / out_step, bias[c] / out_step, low, high, reach, factor
            )
        if line is not None:
            alpha, whole[c], factor = line
            scale[c] = alpha * out_step / step
            result.exact_channels += 1
        else:
            whole[c] = np.rint(bias[c] / unit * factor)
            scale[c] /= factor
            result.rounded_channels += 1
        codes[c] *= factor
    if np.abs(whole).max(initial=0) > 2**30:
        raise UsageError(
            f'{name}: its bias is {np.abs(whole).max():.1e} units of the '
            'accumulator, beyond 32 bits; use the plain form'
        )
    return codes, scale, _Whole(whole, step * scale)


def _clip_of(graph: Graph, dequantize: Any) -> tuple[int, int]:
    clip = graph.producer(dequantize.input[0])
    if clip is not None and clip.op_type == 'Clip':
        return int(graph.array(clip.input[1])), int(graph.array(clip.input[2]))
    return (0, 255)


def _clip_of_next(graph: Graph, quantize: Any) -> tuple[int, int]:
    zero = int(graph.array(quantize.input[2]))
    clip = graph.only_consumer(quantize.output[0])
    low, high = 0, 255
    if clip is not None and clip.op_type == 'Clip':
        low, high = (int(graph.array(n)) for n in clip.input[1:3])
    return low - zero, high - zero


def _add_bias(
    graph: Graph,
    product: Any,
    name: str,
    bias: np.ndarray | _Whole | None,
    scale: np.ndarray,
) -> None:
    if bias is None:
        return
    entry = f'{name}.bias'
    if isinstance(bias, _Whole):
        parts = [f'{entry}.{p}' for p in ('codes', 'scale', 'zero')]
        unit = bias.unit.astype(np.float32)
        graph.constant(parts[0], bias.codes, 'int32')
        graph.constant(parts[1], unit)
        graph.constant(parts[2], np.zeros(unit.shape), 'int32')
        entry = f'{entry}.value'
        graph.insert(
            [graph.node('DequantizeLinear', parts, entry, axis=0)], product
        )
    else:
        graph.constant(entry, bias.astype(np.float32))
    product.input[:] = [*product.input[:2], entry]


def residual_values(traced: Any) -> list[str]:
    """Values that a quantized residual sum reads or writes.

    Those around every sum of two computed values of which one comes from a
    quantized product, by way of a batch norm at most.
    """
    graph = Graph(traced)
    found: dict[str, None] = {}
    for node in graph.nodes:
        if node.op_type != 'Add' or any(
            n in graph.tensors for n in node.input
        ):
            continue
        if any(_from_product(graph, n) for n in node.input):
            output = node.output[0]
            after = graph.only_consumer(output)
            if after is not None and after.op_type == 'Relu':
                output = after.output[0]
            found.update(dict.fromkeys([*node.input, output]))
    return list(found)


def _from_product(graph: Graph, name: str) -> bool:
    node = graph.producer(name)
    if node is not None and node.op_type == 'BatchNormalization':
        node = graph.producer(node.input[0])
    if node is None or node.op_type not in PRODUCTS:
        return False
    source = graph.producer(node.input[0])
    return source is not None and source.domain == DOMAIN


def _quantize_values(
    graph: Graph, ranges: Mapping[str, tuple[float, float]]
) -> None:
    """Put an 8-bit pair behind each value; a ReLU becomes its lower end."""
    for name, (low, high) in ranges.items():
        producer = graph.producer(name)
        low, high = min(low, 0.0), max(high, 0.0)
        source = name
        if producer.op_type == 'Relu':
            source = producer.input[0]
        scale = np.float32(max((high - low) / 255, 1e-8))
        zero = int(np.clip(np.rint(-low / scale), 0, 255))
        graph.constant(f'{name}.q8.scale', np.array(scale))
        graph.constant(f'{name}.q8.zero', np.array(zero), 'uint8')
        parameters = [f'{name}.q8.scale', f'{name}.q8.zero']
        new = [
            graph.node(
                'QuantizeLinear', [source, *parameters], f'{name}.q8.codes'
            ),
            graph.node(
                'DequantizeLinear',
                [f'{name}.q8.codes', *parameters],
                f'{name}.q8',
            ),
        ]
        graph.insert_after(new, producer)
        graph.redirect(name, f'{name}.q8', keep=(new[0],))
