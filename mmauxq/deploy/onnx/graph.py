"""What the export adds to :mod:`onnx_ir`, which edits ONNX graphs."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from torch import nn

from mmauxq.quantizers import named_quantizers
from mmauxq.version import __version__

PRODUCTS = ('Conv', 'Gemm', 'MatMul')


@dataclass
class Lowered:
    """An ONNX model and what had to be decided on the way.

    Args:
        weights: ``'typed'``, ``'int8'`` or ``'qonnx'``, see :func:`.to_onnx`;
            ``'plain'`` for int8 codes, float arithmetic and no folded batch
            norm.
        containers: Weight quantizer -> type that holds its codes.
        transposed: Weight quantizers whose codes are stored as (in, out).
        zeroed: Weight quantizer -> (out,), channels that a folded batch norm
            multiplies by 0.
        folded: Names of batch norms folded into weights and biases.
        kept: Batch norm -> why it is still there.
        codes: Activation quantizer -> (value with its codes, code of zero); in
            QONNX, the value that ``Quant`` gives, and 0.
        float_layers: Quantized layer -> why no integer kernel can run it.
        exact_channels: Output channels whose integer bias changes no code.
        rounded: Layer -> number of channels whose bias is rounded: the codes
            after it may differ from PyTorch's by one, near a threshold.
        reach: Activation quantizer -> how near, in steps, because of that.
        saturating: Quantized layers in which the sum of two products of codes
            may not fit 16 bits.
    """

    weights: str
    model: onnx.ModelProto = field(default_factory=onnx.ModelProto)
    opset: int = 0
    containers: dict[str, str] = field(default_factory=dict)
    transposed: list[str] = field(default_factory=list)
    zeroed: dict[str, np.ndarray] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    codes: dict[str, tuple[str, int]] = field(default_factory=dict)
    float_layers: dict[str, str] = field(default_factory=dict)
    exact_channels: int = 0
    rounded: dict[str, int] = field(default_factory=dict)
    reach: dict[str, float] = field(default_factory=dict)
    saturating: list[str] = field(default_factory=list)


def add_metadata(
    lowered: Lowered, architecture: nn.Module, about: dict[str, Any]
) -> None:
    """Write into the ONNX file what it is, and where its codes are.

    Args:
        lowered: Its model is changed.
        architecture: What it was made of.
        about: How to use it, for JSON.
    """
    quantizers = {}
    kind = 'value' if lowered.weights == 'qonnx' else 'codes'
    for name, quantizer in named_quantizers(architecture):
        if name in lowered.codes or name in lowered.containers:
            value, _ = lowered.codes.get(name, (f'{name}.{kind}', 0))
            quantizers[name] = dict(
                bits=quantizer.bits, role=quantizer.role, codes=value
            )
    entries = {
        **about,
        'mmauxq_version': __version__,
        'mmauxq_quantizers': quantizers,
    }
    for key, value in entries.items():
        text = value if isinstance(value, str) else json.dumps(value)
        lowered.model.metadata_props.add(key=key, value=text)


class NewNodes:
    """Nodes and constants with names of one prefix; constants enter the graph
    at once, nodes wait in ``nodes``."""

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix
        self.nodes: list[ir.Node] = []

    def constant(self, name: str, value: Any, kind: str = '') -> ir.Value:
        """Add an initializer ``prefix.name`` of a type such as ``'int2'``."""
        name, value = f'{self.prefix}.{name}', np.asarray(value)
        if kind:
            value = value.astype(ir.DataType[kind.upper()].numpy())
        tensor = ir.tensor(value, name=name)
        constant = ir.val(name, tensor.dtype, tensor.shape, const_value=tensor)
        self.graph.register_initializer(constant)
        return constant

    def add(
        self,
        op: str,
        name: str,
        *inputs: ir.Value,
        domain: str = '',
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with the output ``prefix.name``, which is returned."""
        output = ir.val(f'{self.prefix}.{name}')
        self.nodes.append(
            ir.node(
                op, inputs, attributes, domain=domain, outputs=[output],
                name=output.name,
            )
        )  # fmt: skip
        return output

    def pair(self, scale: np.ndarray, zero: int, kind: str) -> list[ir.Value]:
        """Constants that quantization and dequantization have in common."""
        zeros = np.full(scale.shape, zero)
        scales = self.constant('scale', scale)
        return [scales, self.constant('zero', zeros, kind)]

    def dequantize(
        self, codes: np.ndarray, scale: np.ndarray, kind: str, axis: int = 0
    ) -> ir.Value:
        """Add constant codes, and a node that gives their values."""
        constant = self.constant('codes', codes, kind)
        pair = self.pair(scale, 0, kind)
        axes = {'axis': axis} if scale.ndim else {}
        return self.add('DequantizeLinear', 'value', constant, *pair, **axes)


def name_of(placeholder: ir.Node) -> str:
    """Name of the quantizer that a placeholder stands for."""
    return placeholder.attributes['name'].as_string()


def array(value: ir.Value | None) -> np.ndarray:
    """The value of an initializer."""
    return value.const_value.numpy()


def is_sum(node: ir.Node) -> bool:
    """Whether a node adds two computed values."""
    constant = any(value.is_initializer() for value in node.inputs)
    return node.op_type == 'Add' and not constant


def only_consumer(value: ir.Value) -> ir.Node | None:
    """The node that takes a value, if there is just one and no other use."""
    takers = value.consumers()
    if len(takers) != 1 or value.is_graph_output():
        return None
    return takers[0]
