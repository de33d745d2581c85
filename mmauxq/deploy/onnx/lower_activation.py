"""An activation quantizer as a pair of ONNX operators."""

import numpy as np
import onnx_ir as ir

from mmauxq.quantizers import Quantizer

from .graph import Lowered, NewNodes, array


def lower_activation(
    node: ir.Node, name: str, quantizer: Quantizer, result: Lowered
) -> None:
    """Put ``QuantizeLinear`` and ``DequantizeLinear`` in a quantizer's place.

    The form for integer kernels clips codes, the others clip values.

    Args:
        node: The placeholder; its graph is changed.
        name: Name of the quantizer.
        quantizer: The quantizer.
        result: Has the form; takes a note of where the codes are.
    """
    grid = quantizer.grid()
    low, high = grid.qmin, grid.qmax
    scale = grid.scale.numpy(force=True).astype(np.float32)
    shape: tuple[int, ...] = ()
    axis = {}
    if quantizer.num_channels is None:
        scale = scale.reshape(())
    else:
        axis = {'axis': quantizer.channel_axis}
        shape = (-1, 1, 1) if quantizer.channel_axis == 1 else (-1,)
    offset = None
    # a runtime drops an offset of 0 as well
    if grid.offset is not None and grid.offset.any():
        offset = grid.offset.numpy(force=True).reshape(shape)
    # no integer kernel takes an offset or scales of channels
    kernels = result.kernels and offset is None and scale.ndim == 0
    # Integer kernels want uint8; a signed code is shifted to fit.
    kind = 'int8' if grid.signed and not kernels else 'uint8'
    zero = 128 if grid.signed and kernels else 0
    new = NewNodes(node.graph, name)
    source = node.inputs[0]
    if offset is not None:
        shift = new.constant('offset', offset, 'float')
        source = new.add('Sub', 'shifted', source, shift)
    if kernels:
        source, low, high = _absorb_clips(source, scale, low, high)
    else:
        # Rounding is monotone: to clip before it is to clip after it. This
        # also keeps runtimes from rounding the bias for an integer kernel.
        source = clip_values(new, source, scale.reshape(shape), low, high)
    pair = (
        new.constant('scale', scale),
        new.constant('zero', np.full(scale.shape, zero), kind),
    )
    codes = new.add('QuantizeLinear', 'codes', source, *pair, **axis)
    if kernels and (low + zero, high + zero) != (0, 255):
        codes = new.add(
            'Clip', 'clipped', codes,
            new.constant('low', low + zero, kind),
            new.constant('high', high + zero, kind),
        )  # fmt: skip
    value = new.add('DequantizeLinear', 'value', codes, *pair, **axis)
    if offset is not None:
        value = new.add('Add', 'unshifted', value, shift)
    result.codes[name] = (codes.name, zero)
    node.prepend(new.nodes)
    node.outputs[0].replace_all_uses_with(value)
    node.graph.remove(node, safe=True)


def clip_values(
    new: NewNodes, source: ir.Value, scale: np.ndarray, low: int, high: int
) -> ir.Value:
    """A value clipped to ``low`` to ``high`` steps of ``scale``."""
    for op, bound in (('Max', low), ('Min', high)):
        limit = new.constant(op.lower(), scale * bound, 'float')
        source = new.add(op, f'{op.lower()}ed', source, limit)
    return source


def _absorb_clips(
    source: ir.Value, scale: np.ndarray, low: int, high: int
) -> tuple[ir.Value, int, int]:
    """Turn activation functions that clip into limits of the codes.

    ``round(min(x, a) / s) = min(round(x / s), round(a / s))``: exact, and the
    quantizer then follows the product at once. Of nested functions, the outer
    one clips the limits of the inner one.
    """
    while (limits := _clip_limits(source.producer())) is not None:
        codes = np.rint(np.float32(limits) / scale)
        low, high = np.clip(codes, low, high).astype(int).tolist()
        source = source.producer().inputs[0]
    return source, low, high


def _clip_limits(node: ir.Node | None) -> list[float] | None:
    """Least and greatest output of a function that clips to constants."""
    if node is None or node.op_type not in ('Relu', 'Clip'):
        return None
    if node.op_type == 'Relu':
        return [0, np.inf]
    limits = [-np.inf, np.inf]
    for i, limit in enumerate(node.inputs[1:]):
        if limit is not None and not limit.is_initializer():
            return None
        if limit is not None:
            limits[i] = float(array(limit))
    return limits
