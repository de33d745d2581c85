"""The form of QONNX: every quantizer is one ``Quant`` node.

Source: Pappalardo et al., QONNX, arXiv:2206.07527; the operator is described
in ``docs/qonnx-custom-ops`` of github.com/fastmachinelearning/qonnx.
"""

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mmauxq.errors import UsageError
from mmauxq.quantizers import Quantizer
from mmauxq.quantizers.base import Grid

from .graph import Lowered, NewNodes, array, name_of, only_consumer
from .qonnx_executor import DOMAIN, OPERATOR


def lower_quantizer(
    node: ir.Node,
    quantizer: Quantizer,
    operand: Tensor | None,
    result: Lowered,
) -> None:
    """Replace a placeholder by ``Quant``, and note in ``result`` which value
    it gives.

    A weight is stored as the values that the quantizer gives, which every
    rounding mode leaves as they are. An offset is subtracted before and added
    after the node, whose zero point is always 0: FINN reads no other, and an
    offset that was learned is no whole number of steps. An unsigned quantizer
    of activations follows a ReLU of its own, which changes no code: FINN
    makes thresholds of both, and takes the ReLU away.

    Args:
        operand: What the quantizer takes, for a weight; else ``None``.

    Raises:
        UsageError: If the operator has no such codes.
    """
    name, grid = name_of(node), quantizer.grid()
    signed, narrow, bits = quant_range(name, grid)
    new = NewNodes(node.graph, name)
    source = node.inputs[0]
    like = torch.empty((1,) * len(source.shape))
    scale = quantizer.broadcast(grid.scale, like).numpy(force=True)
    offset = None
    if grid.offset is not None and grid.offset.any():
        offset = quantizer.broadcast(grid.offset, like).numpy(force=True)
        shift = new.constant('offset', offset, 'float')
    if operand is not None:
        values = quantizer.codes(operand).numpy(force=True) * scale
        if offset is not None:
            values = values + offset
        source = new.constant('weight', values, 'float')
        result.containers[name] = f'{"" if signed else "u"}int{bits}'
    if offset is not None:
        source = new.add('Sub', 'shifted', source, shift)
    if operand is None and not (signed or _is_own_relu(source)):
        source = new.add('Relu', 'rectified', source)
    value = new.add(
        OPERATOR, 'value', source,
        new.constant('scale', scale, 'float'),
        new.constant('zero', 0, 'float'),
        new.constant('bits', bits, 'float'),
        domain=DOMAIN, signed=signed, narrow=narrow, rounding_mode='ROUND',
    )  # fmt: skip
    if operand is None:
        result.codes[name] = (value.name, 0)
    if offset is not None:
        value = new.add('Add', 'unshifted', value, shift)
    node.prepend(new.nodes)
    node.outputs[0].replace_all_uses_with(value)
    node.graph.remove(node, safe=True)


def quant_range(name: str, grid: Grid) -> tuple[int, int, int]:
    """``signed``, ``narrow`` and the bit width of the ``Quant`` node whose
    codes are those of a grid, or a UsageError that names the quantizer.

    Codes that are odd multiples of half a step (DoReFa's weights) take one
    bit more: ``Quant`` of half the step gives all that are there.
    """
    low, high = grid.qmin, grid.qmax
    signed = int(low < 0)
    bits = high.bit_length() + signed
    narrow = int(low == -high) if signed else 0
    lowest = narrow - 2 ** (bits - 1) if signed else 0
    if (low, high) != (lowest, 2 ** (bits - signed) - 1):
        raise UsageError(
            f'{name}: expected codes of a number of bits, as the QONNX '
            f'operator has them, got {low} to {high}'
        )
    return signed, narrow, bits


def _is_own_relu(value: ir.Value) -> bool:
    producer = value.producer()
    return (
        producer is not None
        and producer.op_type == 'Relu'
        and only_consumer(value) is not None
    )


def for_front_ends(graph: ir.Graph) -> None:
    """What the readers of QONNX expect: one image, poolings of whole images
    by the operator of that name, biases of linear layers."""
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape([1, *value.shape[1:]])
    for node in list(graph):
        if node.op_type == 'Gemm' and len(node.inputs) == 2:
            new = NewNodes(graph, node.outputs[0].name)
            outputs = node.outputs[0].shape[-1]
            node.resize_inputs(3)
            node.replace_input_with(
                2, new.constant('bias', np.zeros(outputs), 'float')
            )
        if node.op_type == 'ReduceMean' and _is_global(node):
            pooling = ir.node(
                'GlobalAveragePool', node.inputs[:1], name=node.name
            )
            node.append(pooling)
            output, pooled = node.outputs[0], pooling.outputs[0]
            output.replace_all_uses_with(pooled, True)
            graph.remove(node, safe=True)
            pooled.name = output.name


def _is_global(mean: ir.Node) -> bool:
    """Whether a mean is taken over height and width, which stay as 1."""
    source, axes = mean.inputs
    return (
        len(source.shape) == 4
        and axes.is_initializer()
        and set(np.mod(array(axes), 4)) == {2, 3}
        and mean.attributes.get_int('keepdims', 1) == 1
    )
