"""The audit of an exported file."""

import json
import os

import numpy as np

from mmauxq.analysis import LevelCount
from mmauxq.errors import UsageError

from .runtime import session, with_outputs
from .trace import INPUT


def audit_onnx(
    file: str | os.PathLike, images: np.ndarray
) -> list[LevelCount]:
    """Levels of every quantized tensor of an exported ``model.onnx``.

    Args:
        file: Written by ``tools/export.py``; its metadata say which values
            hold codes, and of how many bits.
        images: (N, C, H, W), preprocessed.

    Returns:
        Weights are counted per output channel, which has a scale of its own;
        activations per tensor, or channel if their scales are per channel.

    Raises:
        UsageError: If the file is none of ours.
    """
    import onnx
    from onnx import numpy_helper

    try:
        model = onnx.load(str(file))
    except Exception as error:  # whatever protobuf raises
        raise UsageError(f'{file}: is no ONNX model') from error
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    if 'mmauxq_quantizers' not in metadata:
        raise UsageError(
            f'{file}: was not written by tools/export.py; its metadata do not '
            'say which tensors are quantized'
        )
    quantizers = json.loads(metadata['mmauxq_quantizers'])
    initialisers = {t.name: t for t in model.graph.initializer}
    counts, seen = [], {}
    for name, entry in quantizers.items():
        if entry['role'] == 'weight':
            codes = numpy_helper.to_array(initialisers[entry['codes']])
            rows = codes.astype(np.int32).reshape(len(codes), -1)
            levels = max(len(np.unique(row)) for row in rows)
            counts.append(LevelCount(name, entry['bits'], levels))
        else:
            seen[name] = (entry, set())
    outputs = [entry['codes'] for entry, _ in seen.values()]
    if outputs:
        running = session(with_outputs(model, outputs))
        for start in range(0, len(images), 64):
            feed = {INPUT: images[start : start + 64]}
            for (_, values), array in zip(
                seen.values(), running.run(outputs, feed), strict=True
            ):
                values.update(np.unique(array).tolist())
    counts += [
        LevelCount(name, entry['bits'], len(values))
        for name, (entry, values) in seen.items()
    ]
    return counts
