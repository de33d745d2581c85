"""A quantized classifier as one ONNX model."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from mmauxq.errors import UsageError
from mmauxq.layers import restore
from mmauxq.quantizers import Quantizer, named_quantizers

from ..packed import weight_operands
from . import runtime
from .graph import (
    PRODUCTS,
    Lowered,
    NewNodes,
    is_sum,
    name_of,
    only_consumer,
)
from .lower_activation import lower_activation
from .lower_qonnx import for_front_ends, lower_quantizer
from .lower_weight import lower_weight
from .trace import DOMAIN, OPSET, trace

LIMIT = 2**31 - 1
"""The most bytes of a protobuf message, which an ONNX file is."""
OPSETS = {
    21: 'the first with INT4; all forms are traced at it',
    25: 'the first with INT2',
}
"""Opset of a file -> why."""


def check_size(size: int) -> None:
    """Raise a UsageError if an ONNX file cannot have so many bytes."""
    if size > LIMIT:
        raise UsageError(
            f'model.onnx: expected at most {LIMIT:,} bytes, the limit of '
            f'protobuf, got {size:,}; packed.safetensors has no limit '
            '(mmauxq.save_packed)'
        )


def to_onnx(
    architecture: nn.Module,
    images: Tensor,
    weights: str = 'typed',
    residual: str = 'float',
    traced: ir.Model | None = None,
) -> Lowered:
    """Export F.

    Args:
        architecture: Quantized, calibrated, in evaluation mode.
        images: (N, C, H, W), preprocessed; the shape counts, and with
            ``residual='int8'`` the ranges.
        weights: ``'typed'``: weights in the narrowest ONNX type that holds
            their codes, float arithmetic; ``'int8'``: a form that runtimes
            give to integer kernels. A product is followed by its
            ``QuantizeLinear`` at once, and biases are integers (see
            :mod:`.integer_bias`); ``'qonnx'``: float weights, each behind a
            ``Quant`` node (see :mod:`.lower_qonnx`), and no folded batch norm.
        residual: ``'float'`` or, with int8 weights, ``'int8'``: residual sums
            and what enters them are quantized to 8 bits, so that every
            product can be written by an integer kernel.
        traced: The graph of ``architecture``, if there is one.

    Raises:
        UsageError: If the network cannot be expressed.
    """
    quantizers = dict(named_quantizers(architecture))
    operands = weight_operands(architecture, images[:1])
    if traced is None:
        traced = trace(architecture, images.shape[1:])
    ranges = {}
    names = residual_values(traced.graph) if residual == 'int8' else []
    if names:
        plain = _lower(traced, quantizers, operands, 'plain', {})
        ranges = _ranges(plain.model, names, images.numpy())
    return _lower(traced, quantizers, operands, weights, ranges)


def float_onnx(
    architecture: nn.Module, shape: Sequence[int]
) -> onnx.ModelProto:
    """The network without quantizers, for images of (C, H, W) = ``shape``."""
    network = restore(copy.deepcopy(architecture))
    with torch.no_grad():
        return _finish(trace(network, shape), OPSET)


def _ranges(
    model: onnx.ModelProto, names: list[str], images: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Least and greatest value of inner values on sample images."""
    ranges = dict.fromkeys(names, (np.inf, -np.inf))
    for values in runtime.inner_values(model, names, images):
        for name, value in values.items():
            low, high = ranges[name]
            low, high = min(low, value.min()), max(high, value.max())
            ranges[name] = float(low), float(high)
    return ranges


def _lower(
    traced: ir.Model,
    quantizers: Mapping[str, Quantizer],
    operands: Mapping[str, Tensor],
    weights: str,
    ranges: Mapping[str, tuple[float, float]],
) -> Lowered:
    """Replace the placeholders in a copy of a traced graph."""
    model = traced.clone()
    placeholders = [node for node in model.graph if node.domain == DOMAIN]
    for name, count in Counter(map(name_of, placeholders)).items():
        if count > 1:
            raise UsageError(
                f'{name}: expected layers that run once in a forward pass, '
                f'got one that runs {count} times'
            )
    result = Lowered(weights)
    if weights == 'qonnx':
        for node in placeholders:
            name = name_of(node)
            operand = operands.get(name)
            lower_quantizer(node, quantizers[name], operand, result)
        for_front_ends(model.graph)
        result.kept = {
            node.outputs[0].name: 'this form folds none'
            for node in model.graph
            if node.op_type == 'BatchNormalization'
        }
        result.opset, result.model = OPSET, _finish(model, OPSET)
        return result
    quantize_values(model.graph, ranges)
    for node in placeholders:
        if name_of(node) not in operands:
            lower_activation(node, quantizers[name_of(node)], result)
    # drops activation functions that became limits of codes
    common.RemoveUnusedNodesPass()(model)
    for node in placeholders:
        if (name := name_of(node)) in operands:
            lower_weight(node, quantizers[name], operands[name], result)
    result.opset = 25 if 'int2' in result.containers.values() else OPSET
    result.model = _finish(model, result.opset)
    return result


def _finish(model: ir.Model, opset: int) -> onnx.ModelProto:
    """The model as it is written to a file, without what nothing needs."""
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)
    model.functions.clear()
    model.metadata_props.clear()
    model.opset_imports.clear()
    model.opset_imports[''] = opset
    for node in model.graph:
        model.opset_imports.setdefault(node.domain, 1)
    model.ir_version = 13 if opset >= 25 else 10
    constants = model.graph.initializers.values()
    check_size(sum(value.const_value.nbytes for value in constants))
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    for value in [*proto.graph.input, *proto.graph.output]:
        del value.metadata_props[:]
    onnx.checker.check_model(proto)
    return proto


# --- residual sums in 8 bits, so that integer kernels can write into them ----


def residual_values(graph: ir.Graph) -> list[str]:
    """Names of the values that a quantized residual sum reads or writes.

    A residual sum adds two computed values, of which one comes from a
    quantized product, with at most a batch norm between.
    """
    names: list[str] = []
    for node in graph:
        if is_sum(node) and any(map(_from_product, node.inputs)):
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
