"""The audit of an exported file."""

import os
from typing import Any

import numpy as np

from mmauxq.analysis import LevelCount
from mmauxq.errors import UsageError, one_line, shorten
from mmauxq.files import parse_json
from mmauxq.optional import need
from mmauxq.quantizers.base import MOST_BITS, ROLES

from .qonnx_executor import DOMAIN, OPERATOR, Session
from .runtime import inner_values, session
from .trace import INPUT


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
    if _is_qonnx(model):
        need('qonnx')
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
            and entry.get('role') in ROLES
            and 1 <= entry['bits'] <= MOST_BITS[entry['role']]
            and isinstance(entry.get('codes'), str)
        )
        if not known:
            raise UsageError(
                f'{file}: mmauxq_quantizers: {shorten(name)}: expected the '
                f'bits of a role, and codes, got {shorten(entry)}'
            )
    return entries


def _count(
    model: Any, quantizers: dict[str, dict], images: np.ndarray
) -> list[LevelCount]:
    weights = [
        n for n, entry in quantizers.items() if entry['role'] == 'weight'
    ]
    values = {name: quantizers[name]['codes'] for name in weights}
    if _is_qonnx(model):
        start: Any = Session
        rows = _qonnx_rows(model, values, images[:1])
    else:
        start = session
        rows = _typed_rows(model, values)
    levels = {
        name: max(len(np.unique(row.astype(np.int32))) for row in rows[name])
        for name in weights
    }
    seen: dict[str, set[int]] = {
        entry['codes']: set()
        for name, entry in quantizers.items()
        if name not in levels
    }
    names = list(seen)
    for batch in inner_values(model, names, images, start) if seen else ():
        for value, codes in batch.items():
            seen[value].update(np.unique(codes).tolist())
    for name, entry in quantizers.items():
        if name not in levels:
            levels[name] = len(seen[entry['codes']])
    return [
        LevelCount(name, quantizers[name]['bits'], count)
        for name, count in levels.items()
    ]


def _is_qonnx(model: Any) -> bool:
    return any(entry.domain == DOMAIN for entry in model.opset_import)


def _typed_rows(model: Any, values: dict[str, str]) -> dict[str, Any]:
    """Name -> codes of a weight, in rows that share a scale."""
    from onnx import numpy_helper

    tensors = {t.name: t for t in model.graph.initializer}
    pairs = {
        node.input[0]: node
        for node in model.graph.node
        if node.op_type == 'DequantizeLinear'
    }
    rows = {}
    for name, value in values.items():
        pair = pairs[value]
        codes, scale = (
            numpy_helper.to_array(tensors[key]) for key in pair.input[:2]
        )
        rows[name] = [codes]
        if scale.ndim:
            (axis,) = (a.i for a in pair.attribute if a.name == 'axis')
            rows[name] = np.moveaxis(codes, axis, 0)
    return rows


def _qonnx_rows(
    model: Any, values: dict[str, str], image: np.ndarray
) -> dict[str, Any]:
    """:func:`_typed_rows` of a file in QONNX, whose axis 0 has the scales."""
    codes = Session(model).run(list(values.values()), {INPUT: image})
    scales = {
        node.output[0]: node.input[1]
        for node in model.graph.node
        if node.op_type == OPERATOR
    }
    sizes = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer}
    return {
        name: found if sizes[scales[value]] > 1 else [found]
        for (name, value), found in zip(values.items(), codes, strict=True)
    }
