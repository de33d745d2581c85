"""The content of a .tflite file, in the classes of its schema."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..onnx.trace import INPUT, OUTPUT
from ..packed import pack, unpack

if TYPE_CHECKING:
    from .convert import Weight

METADATA = 'mmauxq'
LIMIT = 2**31 - 2**20
"""Bytes of weights. Places in a file are 31-bit numbers."""


def assemble(
    content: bytes,
    weights: Mapping[str, 'Weight'],
    activations: Sequence[str],
    about: dict[str, Any],
    inspected: bool,
) -> bytes:
    """Put integer weights into a converted network.

    Each weight, an input so far, becomes a constant and a ``DEQUANTIZE``
    before everything else.

    Args:
        content: From the converter, with the inputs image and weights, and
            the outputs logits and codes.
        weights: By the name of the quantizer, in the order of the inputs.
        activations: Names of quantizers, in the order of the outputs.
        about: For the metadata.
        inspected: Whether the codes stay outputs; else all that only they
            need goes.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    (graph,), (signature,) = model.subgraphs, model.signatureDefs
    for tensor in graph.tensors:
        tensor.name = b''  # long descriptions of the Python code
    inputs = _in_order(signature.inputs)
    outputs = _in_order(signature.outputs)
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = (
        schema.BuiltinOperator.DEQUANTIZE
    )
    code.version = 6  # has 4 bits
    model.operatorCodes.append(code)
    added = []
    for entry, (name, weight) in zip(inputs[1:], weights.items(), strict=True):
        buffer = schema.BufferT()
        mask = 2**weight.bits - 1
        buffer.data = pack(weight.index.view(np.uint8) & mask, weight.bits)
        model.buffers.append(buffer)
        constant = schema.TensorT()
        constant.name = f'{name}.codes'.encode()
        constant.shape = list(weight.index.shape)
        constant.type = getattr(schema.TensorType, f'INT{weight.bits}')
        constant.buffer = len(model.buffers) - 1
        constant.hasRank = True
        constant.quantization = schema.QuantizationParametersT(
            scale=weight.scale,
            zeroPoint=np.zeros(len(weight.scale), np.int64),
            quantizedDimension=0,
        )
        graph.tensors.append(constant)
        added.append(
            schema.OperatorT(
                opcodeIndex=len(model.operatorCodes) - 1,
                inputs=[len(graph.tensors) - 1],
                outputs=[entry.tensorIndex],
            )
        )
    graph.operators = [*added, *graph.operators]
    inputs[0].name = INPUT.encode()
    signature.inputs = inputs[:1]
    names = [OUTPUT, *(f'{name}.codes' for name in activations)]
    for entry, name in zip(outputs, names, strict=True):
        entry.name = name.encode()
        graph.tensors[entry.tensorIndex].name = name.encode()
    signature.outputs = outputs if inspected else outputs[:1]
    graph.inputs = [entry.tensorIndex for entry in signature.inputs]
    graph.outputs = [entry.tensorIndex for entry in signature.outputs]
    graph.operators = _needed(graph)
    _drop_unused(model)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(json.dumps(about).encode(), np.uint8)
    model.buffers.append(buffer)
    entry = schema.MetadataT(METADATA.encode(), len(model.buffers) - 1)
    model.metadata = [*(model.metadata or []), entry]
    model.description = b'MMAuxQ'
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _in_order(entries: Sequence[Any]) -> list[Any]:
    """Entries of a signature, whose names end in a number."""
    return sorted(entries, key=lambda entry: int(entry.name.split(b'_')[-1]))


def _needed(graph: Any) -> list[Any]:
    """The operators that the outputs need; each comes after its inputs."""
    wanted, result = set(graph.outputs), []
    for operator in reversed(graph.operators):
        if not wanted.isdisjoint(operator.outputs):
            wanted.update(operator.inputs)
            result.append(operator)
    return result[::-1]


def _drop_unused(model: Any) -> None:
    """Remove tensors that no operator has, and their buffers."""
    (graph,), (signature,) = model.subgraphs, model.signatureDefs
    used = {*graph.inputs, *graph.outputs}
    for operator in graph.operators:
        used.update(operator.inputs, operator.outputs)
    kept = sorted(used - {-1})  # which stands for an input that is left out
    places = {old: new for new, old in enumerate(kept)} | {-1: -1}
    graph.tensors = [graph.tensors[old] for old in kept]
    for owner in (graph, *graph.operators):
        owner.inputs = [places[old] for old in owner.inputs]
        owner.outputs = [places[old] for old in owner.outputs]
    for entry in (*signature.inputs, *signature.outputs):
        entry.tensorIndex = places[entry.tensorIndex]
    holders = [*graph.tensors, *(model.metadata or [])]
    buffers = sorted({0, *(holder.buffer for holder in holders)})
    model.buffers = [model.buffers[old] for old in buffers]
    numbers = {old: new for new, old in enumerate(buffers)}
    for holder in holders:
        holder.buffer = numbers[holder.buffer]


def stored_weights(content: bytes) -> dict[str, np.ndarray]:
    """The integers of each quantized weight of a file, by the name of its
    quantizer."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    widths = {getattr(schema.TensorType, f'INT{n}'): n for n in (2, 4, 8)}
    result = {}
    for tensor in model.subgraphs[0].tensors:
        name = tensor.name.decode().removesuffix('.codes')
        if tensor.type in widths:
            bits, shape = widths[tensor.type], tuple(tensor.shape)
            data = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
            index = unpack(data, bits, int(np.prod(shape))).astype(int)
            index -= (index >= 2 ** (bits - 1)) * 2**bits
            result[name] = index.reshape(shape)
    return result


def operators(content: bytes) -> dict[str, int]:
    """Operator -> its number in a file."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    names = {
        value: name for name, value in vars(schema.BuiltinOperator).items()
    }
    codes = [names[code.builtinCode] for code in model.operatorCodes]
    return dict(
        Counter(codes[o.opcodeIndex] for o in model.subgraphs[0].operators)
    )
