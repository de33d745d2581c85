"""An activation quantizer as a pair of ONNX operators."""

import numpy as np
import onnx_ir as ir

from mmauxq.quantizers import Quantizer

from .graph import Lowered, NewNodes, array, name_of


def lower_activation(
    node: ir.Node, quantizer: Quantizer, result: Lowered
) -> None:
    """Replace a placeholder by ``QuantizeLinear``, ``DequantizeLinear`` in the
    form that ``result`` says, and note there where the codes are.

    The form for integer kernels clips codes, the others clip values.
    """
    name, grid = name_of(node), quantizer.grid()
    low, high = grid.qmin, grid.qmax
    scale = grid.scale.numpy(force=True).astype(np.float32)
    axis = quantizer.channel_axis
    shape: tuple[int, ...] = (-1, 1, 1) if axis == 1 else (-1,)
    if quantizer.num_channels is None:
        shape, scale = (), scale.reshape(())
    offset = None
    # a runtime drops an offset of 0 as well
    if grid.offset is not None and grid.offset.any():
        offset = grid.offset.numpy(force=True).reshape(shape)
    # no integer kernel takes an offset, scales of channels or 16 bits
    width = 8 if high - low < 256 else 16
    simple = offset is None and scale.ndim == 0 and width == 8
    kernels = simple and result.weights == 'int8'
    # Integer kernels want uint8; a signed code is shifted to fit.
    kind = f'{"int" if low < 0 and not kernels else "uint"}{width}'
    zero = 128 if low < 0 and kernels else 0
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
    pair = new.pair(scale, zero, kind)
    axes = {'axis': axis} if scale.ndim else {}
    codes = new.add('QuantizeLinear', 'codes', source, *pair, **axes)
    if kernels and (low + zero, high + zero) != (0, 255):
        least = new.constant('low', low + zero, kind)
        most = new.constant('high', high + zero, kind)
        codes = new.add('Clip', 'clipped', codes, least, most)
    value = new.add('DequantizeLinear', 'value', codes, *pair, **axes)
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

    ``round(min(x, a) / s) = min(round(x / s), round(a / s))`` is exact, and
    the quantizer then follows the product at once. Of nested functions, the
    outer one clips the limits of the inner one.
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
