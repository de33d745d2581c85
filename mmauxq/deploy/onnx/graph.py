"""What the export adds to :mod:`onnx_ir`, which edits ONNX graphs."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

PRODUCTS = ('Conv', 'Gemm', 'MatMul')


class NewNodes:
    """Nodes and constants with names of one prefix.

    Constants are in the graph at once. Nodes wait in ``nodes``, to be put in
    with ``ir.Node.prepend`` or ``ir.Node.append`` of another node.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        self.nodes: list[ir.Node] = []

    def constant(self, name: str, value: Any, kind: str = '') -> ir.Value:
        """Add an initializer ``prefix.name``.

        Args:
            name: The rest of its name.
            value: An array, or what NumPy makes one of.
            kind: ``'int2'``, ``'int8'``, ...; the type of ``value`` if empty.
        """
        name, value = f'{self.prefix}.{name}', np.asarray(value)
        if kind:
            value = value.astype(ir.DataType[kind.upper()].numpy())
        tensor = ir.tensor(value, name=name)
        constant = ir.val(name, tensor.dtype, tensor.shape, const_value=tensor)
        self.graph.register_initializer(constant)
        return constant

    def add(
        self, op: str, name: str, *inputs: ir.Value, **attributes: Any
    ) -> ir.Value:
        """Add a node with the output ``prefix.name``, which is returned."""
        output = ir.val(f'{self.prefix}.{name}')
        self.nodes.append(
            ir.node(op, inputs, attributes, outputs=[output], name=output.name)
        )
        return output


def array(value: ir.Value | None) -> np.ndarray:
    """The value of an initializer."""
    return value.const_value.numpy()


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that takes a value, if there is just one and no other use."""
    takers = value.consumers()
    if len(takers) != 1 or value.is_graph_output():
        return None
    return takers[0]


def prune(model: ir.Model) -> None:
    """Drop nodes and initializers that no output depends on."""
    common.RemoveUnusedNodesPass()(model)


def finish(model: ir.Model, opset: int) -> onnx.ModelProto:
    """The model as it is written to a file, without what nothing needs.

    Raises:
        onnx.checker.ValidationError: If it is no valid model.
    """
    prune(model)
    common.ClearMetadataAndDocStringPass()(model)
    model.functions.clear()
    model.metadata_props.clear()
    model.opset_imports.clear()
    model.opset_imports[''] = opset
    model.ir_version = 13 if opset >= 25 else 10
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    for value in [*proto.graph.input, *proto.graph.output]:
        del value.metadata_props[:]
    onnx.checker.check_model(proto)
    return proto
