"""Residual sums in 8 bits, so that integer kernels can write into them."""

from collections.abc import Mapping

import numpy as np

from .graph import PRODUCTS, Graph
from .trace import DOMAIN


def residual_values(graph: Graph) -> list[str]:
    """Values that a quantized residual sum reads or writes.

    Those around every sum of two computed values of which one comes from a
    quantized product, by way of a batch norm at most.
    """
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


def quantize_values(
    graph: Graph, ranges: Mapping[str, tuple[float, float]]
) -> None:
    """Put an 8-bit pair behind each value; a ReLU becomes its lower end.

    A value that float arithmetic gives anyhow, such as that of a pooling,
    keeps its other takers: they lose no precision, and the runtime does not
    move the pair in front of the pooling, which has no fast integer kernel.
    """
    for name, (low, high) in ranges.items():
        producer = graph.producer(name)
        low, high = min(low, 0.0), max(high, 0.0)
        scale = np.float32(max((high - low) / 255, 1e-8))
        zero = int(np.clip(np.rint(-low / scale), 0, 255))
        graph.constant(f'{name}.q8.scale', np.array(scale))
        graph.constant(f'{name}.q8.zero', np.array(zero), 'uint8')
        parameters = [f'{name}.q8.scale', f'{name}.q8.zero']
        relu = producer.op_type == 'Relu'
        new = [
            graph.node(
                'QuantizeLinear',
                [producer.input[0] if relu else name, *parameters],
                f'{name}.q8.codes',
            ),
            graph.node(
                'DequantizeLinear',
                [f'{name}.q8.codes', *parameters],
                f'{name}.q8',
            ),
        ]
        graph.insert_after(new, producer)
        in_float = producer.op_type in ('MaxPool', 'AveragePool')
        keep = [node for node in graph.consumers(name) if node is new[0]]
        if in_float:
            keep += [n for n in graph.consumers(name) if n.op_type != 'Add']
        graph.redirect(name, f'{name}.q8', keep=keep)
