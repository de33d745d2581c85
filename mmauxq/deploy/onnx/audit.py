"""The audit of an exported file."""

import json
import os

import numpy as np

from mmauxq.analysis import LevelCount
from mmauxq.errors import UsageError

from .runtime import inner_values


def audit_onnx(
    file: str | os.PathLike, images: np.ndarray
) -> list[LevelCount]:
    """Levels of every quantized tensor of an exported ``model.onnx``, on
    preprocessed images (N, C, H, W).

    Weights are counted for each scale, activations per tensor. The metadata
    say which values hold codes, and of how many bits.
    """
    import onnx
    from onnx import numpy_helper

    try:
        model = onnx.load(str(file))
    except Exception as error:  # whatever protobuf raises
        raise UsageError(f'{file}: expected an ONNX model') from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if 'mmauxq_quantizers' not in metadata:
        raise UsageError(
            f'{file}: expected a file of tools/export.py, whose metadata say '
            'which tensors are quantized'
        )
    quantizers = json.loads(metadata['mmauxq_quantizers'])
    tensors = {t.name: t for t in model.graph.initializer}
    pairs = {
        node.input[0]: node
        for node in model.graph.node
        if node.op_type == 'DequantizeLinear'
    }
    levels: dict[str, int] = {}
    seen: dict[str, set[int]] = {}
    for name, entry in quantizers.items():
        if entry['role'] != 'weight':
            seen[entry['codes']] = set()
            continue
        pair = pairs[entry['codes']]
        codes, scale = (
            numpy_helper.to_array(tensors[key]) for key in pair.input[:2]
        )
        rows = [codes]
        if scale.ndim:
            (axis,) = (a.i for a in pair.attribute if a.name == 'axis')
            rows = np.moveaxis(codes, axis, 0)
        levels[name] = max(
            len(np.unique(row.astype(np.int32))) for row in rows
        )
    for batch in inner_values(model, list(seen), images) if seen else ():
        for value, codes in batch.items():
            seen[value].update(np.unique(codes).tolist())
    for name, entry in quantizers.items():
        if name not in levels:
            levels[name] = len(seen[entry['codes']])
    return [
        LevelCount(name, quantizers[name]['bits'], count)
        for name, count in levels.items()
    ]
