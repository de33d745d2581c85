"""A small editor for ONNX graphs."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

PRODUCTS = ('Conv', 'Gemm', 'MatMul')
# INT2 came with onnx 1.20
NARROW = {
    kind: getattr(TensorProto, kind.upper())
    for kind in ('int2', 'int4', 'int8', 'uint8', 'int32')
    if hasattr(TensorProto, kind.upper())
}


class Graph:
    """Nodes in topological order, initialisers by name.

    Args:
        model: An ``onnx.ModelProto``; changed by :meth:`finish`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.tensors = {t.name: t for t in model.graph.initializer}
        self.outputs = [value.name for value in model.graph.output]
        self._count = 0
        for node in list(self.nodes):  # constants are initialisers here
            if node.op_type == 'Constant' and node.attribute[0].name == (
                'value'
            ):
                tensor = node.attribute[0].t
                tensor.name = node.output[0]
                self.tensors[tensor.name] = tensor
                self.nodes.remove(node)

    def producer(self, name: str) -> NodeProto | None:
        """The node that gives a value."""
        for node in self.nodes:
            if name in node.output:
                return node
        return None

    def consumers(self, name: str) -> list[NodeProto]:
        """The nodes that take a value; each once."""
        return [node for node in self.nodes if name in node.input]

    def only_consumer(self, name: str) -> NodeProto | None:
        """The one node that takes a value, if there is just one."""
        found = self.consumers(name)
        if len(found) != 1 or name in self.outputs:
            return None
        return found[0]

    def array(self, name: str) -> np.ndarray | None:
        """The value of an initialiser."""
        tensor = self.tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def constant(self, name: str, value: Any, kind: str = '') -> str:
        """Add an initialiser, of a type of :data:`NARROW` or its own."""
        value = np.asarray(value)
        if kind in ('int2', 'int4'):
            tensor = helper.make_tensor(
                name, NARROW[kind], value.shape, value.reshape(-1).tolist()
            )
        else:
            if kind:
                value = value.astype(kind)
            tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
            tensor.dims[:] = value.shape  # ascontiguousarray drops 0-d
        self.tensors[name] = tensor
        return name

    def node(
        self, op: str, inputs: list[str], output: str, **attributes: Any
    ) -> NodeProto:
        """A node that is not in the graph yet."""
        return helper.make_node(
            op, inputs, [output], name=output, **attributes
        )

    def insert(self, new: list[NodeProto], before: NodeProto) -> None:
        """Put nodes in front of another."""
        at = next(i for i, n in enumerate(self.nodes) if n is before)
        self.nodes[at:at] = new

    def insert_after(self, new: list[NodeProto], after: NodeProto) -> None:
        """Put nodes behind another."""
        at = next(i for i, n in enumerate(self.nodes) if n is after)
        self.nodes[at + 1 : at + 1] = new

    def remove(self, node: NodeProto) -> None:
        """Take a node out."""
        self.nodes = [n for n in self.nodes if n is not node]

    def redirect(
        self, old: str, new: str, keep: Sequence[NodeProto] = ()
    ) -> None:
        """Let all takers of ``old`` take ``new``, but for those kept."""
        for node in self.nodes:
            if not any(node is k for k in keep):
                node.input[:] = [new if n == old else n for n in node.input]

    def prune(self) -> None:
        """Drop nodes whose values nothing takes."""
        needed = set(self.outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(node.input)
        self.nodes = kept[::-1]
        self.tensors = {n: t for n, t in self.tensors.items() if n in needed}

    def finish(self, opset: int) -> Any:
        """The model, without what nothing needs.

        Raises:
            onnx.checker.ValidationError: If it is no valid model.
        """
        self.prune()
        model = self.model
        del model.graph.node[:], model.graph.initializer[:]
        del model.graph.value_info[:], model.opset_import[:]
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(self.tensors.values())
        for node in model.graph.node:
            del node.metadata_props[:]
            node.doc_string = ''
        del model.functions[:], model.metadata_props[:]
        del model.graph.metadata_props[:]
        for value in [*model.graph.input, *model.graph.output]:
            del value.metadata_props[:]
        model.opset_import.append(helper.make_opsetid('', opset))
        model.ir_version = 13 if opset >= 25 else 10
        onnx.checker.check_model(model)
        return model


def attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def count_ops(model: Any) -> dict[str, int]:
    """Operator -> how often it stands in a model."""
    counts: dict[str, int] = defaultdict(int)
    for node in model.graph.node:
        counts[node.op_type] += 1
    return dict(counts)
