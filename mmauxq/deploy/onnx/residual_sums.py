"""Residual sums in 8 bits, so that integer kernels can write into them."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from .graph import PRODUCTS, NewNodes, only_consumer
from .trace import DOMAIN


def residual_values(graph: ir.Graph) -> list[str]:
    """Names of the values that a quantized residual sum reads or writes.

    A residual sum adds two computed values, of which one comes from a
    quantized product, with at most a batch norm between.
    """
    names: list[str] = []
    for node in graph:
        if (
            node.op_type == 'Add'
            and not any(value.is_initializer() for value in node.inputs)
            and any(_from_product(value) for value in node.inputs)
        ):
            output = node.outputs[0]
            after = only_consumer(output)
            if after is not None and after.op_type == 'Relu':
                output = after.outputs[0]
            names += [value.name for value in (*node.inputs, output)]
    return list(dict.fromkeys(names))


def _from_product(value: ir.Value) -> bool:
    node = value.producer()
    if node is not None and node.op_type == 'BatchNormalization':
        node = node.inputs[0].producer()
    if node is None or node.op_type not in PRODUCTS:
        return False
    source = node.inputs[0].producer()
    return source is not None and source.domain == DOMAIN


def quantize_values(
    graph: ir.Graph, ranges: Mapping[str, tuple[float, float]]
) -> None:
    """Put an 8-bit pair behind each value; a ReLU becomes its lower end.

    Only sums take the quantized result of a pooling: so the runtime does not
    move the pair in front of the pooling, which has no fast integer kernel.
    ``ranges`` has the least and greatest value of each.
    """
    values = {value.name: value for node in graph for value in node.outputs}
    for name, (low, high) in ranges.items():
        value, producer = values[name], values[name].producer()
        pooled = producer.op_type in ('MaxPool', 'AveragePool')
        uses = value.uses()
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.float32(max((high - low) / 255, 1e-8))
        zero = int(np.clip(np.rint(-low / scale), 0, 255))
        new = NewNodes(graph, f'{name}.q8')
        source = producer.inputs[0] if producer.op_type == 'Relu' else value
        pair = new.pair(scale, zero, 'uint8')
        codes = new.add('QuantizeLinear', 'codes', source, *pair)
        quantized = new.add('DequantizeLinear', 'value', codes, *pair)
        producer.append(new.nodes)
        for use in uses:
            if not pooled or use.node.op_type == 'Add':
                use.node.replace_input_with(use.idx, quantized)
