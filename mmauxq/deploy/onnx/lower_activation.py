"""An activation quantizer as a pair of ONNX operators."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from mmauxq.quantizers import Quantizer

from .graph import Graph

if TYPE_CHECKING:
    from .lower import Lowered


def array(value: Tensor) -> np.ndarray:
    """A tensor as NumPy has it."""
    return value.detach().cpu().numpy()


def lower_activation(
    graph: Graph,
    node: Any,
    name: str,
    quantizer: Quantizer,
    kernels: bool,
    result: 'Lowered',
) -> None:
    """Put ``QuantizeLinear`` and ``DequantizeLinear`` in a quantizer's place.

    Args:
        graph: Changed.
        node: The placeholder.
        name: Of the quantizer.
        quantizer: The quantizer.
        kernels: Clip the codes (for integer kernels), not the values.
        result: Notes where the codes are.
    """
    grid = quantizer.grid()
    source, output = node.input[0], node.output[0]
    axis = {}
    scale = array(grid.scale).astype(np.float32)
    offset = None if grid.offset is None else array(grid.offset)
    if offset is not None and not offset.any():
        offset = None  # as a runtime finds, too
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
    # no integer kernel takes these: as in the plain form
    kernels = kernels and offset is None and scale.ndim == 0
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
    if kernels:
        source, low, high = _absorb_clips(graph, source, scale, low, high)
    else:
        # Rounding is monotone: to clip before it is to clip after it. This
        # also keeps runtimes from rounding the bias for an integer kernel.
        new += clip_values(graph, name, source, spread, low, high)
        source = new[-1].output[0]
    graph.constant(f'{name}.scale', scale)
    graph.constant(f'{name}.zero', np.full(scale.shape, zero), kind)
    codes = f'{name}.codes'
    scales = [f'{name}.scale', f'{name}.zero']
    new.append(graph.node('QuantizeLinear', [source, *scales], codes, **axis))
    if kernels and (low + zero, high + zero) != type_range:
        limits = [f'{name}.low', f'{name}.high']
        graph.constant(limits[0], np.array(low + zero), kind)
        graph.constant(limits[1], np.array(high + zero), kind)
        codes = f'{name}.clipped'
        new.append(graph.node('Clip', [new[-1].output[0], *limits], codes))
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


def clip_values(
    graph: Graph,
    name: str,
    source: str,
    scale: np.ndarray,
    low: int,
    high: int,
) -> list[Any]:
    """Nodes that clip a value to ``low`` to ``high`` steps; not yet in."""
    new = []
    for op, bound in (('Max', low), ('Min', high)):
        limit = f'{name}.{op.lower()}'
        graph.constant(limit, (scale * bound).astype(np.float32))
        new.append(graph.node(op, [source, limit], f'{limit}ed'))
        source = f'{limit}ed'
    return new


def _absorb_clips(
    graph: Graph, source: str, scale: np.ndarray, low: int, high: int
) -> tuple[str, int, int]:
    """Turn activation functions that clip into limits of the codes.

    ``round(min(x, a) / s) = min(round(x / s), round(a / s))``: exact, and the
    quantizer then follows the product at once.
    """
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
