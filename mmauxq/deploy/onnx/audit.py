"""The audit of an exported file."""

import os
from typing import Any

import numpy as np

from mmauxq.analysis import LevelCount
from mmauxq.errors import UsageError, one_line, shorten
from mmauxq.files import parse_json
from mmauxq.quantizers.base import ROLES

from .runtime import inner_values


def audit_onnx(
    file: str | os.PathLike, images: np.ndarray
) -> list[LevelCount]:
    """Levels of every quantized tensor of an exported ``model.onnx``, on
    preprocessed images (N, C, H, W).

    Weights are counted for each scale, activations per tensor. The metadata
    say which values hold codes, and of how many bits.

    Raises:
        UsageError: If the file is damaged, or was not made by an export.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # whatever protobuf raises
        raise UsageError(f'{file}: expected an ONNX model') from error
    if any(uses_external_data(t) for t in model.graph.initializer):
        raise UsageError(
            f'{file}: expected a file of an export, got one whose tensors '
            'are in other files'
        )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    quantizers = _quantizers(file, metadata.get('mmauxq_quantizers'))
    try:
        return _count(model, quantizers, images)
    except Exception as error:  # whatever a damaged graph brings about
        raise UsageError(
            f'{file}: expected a file of an export as it was written, got one '
            f'that cannot be audited ({one_line(error, 200)})'
        ) from error


def _quantizers(file: str | os.PathLike, text: str | None) -> dict[str, dict]:
    """What the metadata say of each quantizer."""
    if text is None:
        raise UsageError(
            f'{file}: expected a file of tools/export.py, whose metadata say '
            'which tensors are quantized'
        )
    try:
        entries: Any = parse_json(text)
    except ValueError as error:
        raise UsageError(
            f'{file}: mmauxq_quantizers: expected JSON ({error})'
        ) from error
    if not isinstance(entries, dict):
        entries = {'': entries}
    for name, entry in entries.items():
        known = isinstance(entry, dict) and (
            type(entry.get('bits')) is int
            and 1 <= entry['bits'] <= 8
            and entry.get('role') in ROLES
            and isinstance(entry.get('codes'), str)
        )
        if not known:
            raise UsageError(
                f'{file}: mmauxq_quantizers: {shorten(name)}: expected bits '
                f'from 1 to 8, a role and codes, got {shorten(entry)}'
            )
    return entries


def _count(
    model: Any, quantizers: dict[str, dict], images: np.ndarray
) -> list[LevelCount]:
    from onnx import numpy_helper

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
