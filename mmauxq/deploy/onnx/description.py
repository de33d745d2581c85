"""What a program must know to use an exported network."""

import json
from typing import Any

import torch

from mmauxq.quantizers import named_quantizers
from mmauxq.version import __version__

from ..network import Network
from ..slim import class_names
from .lowered import Lowered
from .runtime import cpu_features, cpu_name


def describe(network: Network) -> dict[str, Any]:
    """Pre-processing and classes, for JSON."""
    pre = network.algorithm.data_preprocessor

    def numbers(name: str) -> list[float] | None:
        value = getattr(pre, name, None)
        if value is None:
            return None
        return [float(f'{x:.7g}') for x in value.flatten().tolist()]

    swaps = getattr(pre, 'to_rgb', False) or getattr(
        pre, 'channel_conversion', False
    )
    return dict(
        mean=numbers('mean'),
        std=numbers('std'),
        channel_order='RGB' if swaps else 'as read',
        classes=class_names(network.meta),
    )


def add_metadata(lowered: Lowered, network: Network) -> None:
    """Write into the ONNX file how to use it, and where its codes are."""
    quantizers = {}
    for name, quantizer in named_quantizers(network.architecture):
        value = f'{name}.codes'
        if name in lowered.codes:
            value, _ = lowered.codes[name]
        elif name not in lowered.containers:
            continue
        quantizers[name] = dict(
            bits=quantizer.bits, role=quantizer.role, codes=value
        )
    entries = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in describe(network).items()
    } | {
        'preprocessing': 'images = (pixels 0..255 - mean) / std, NCHW',
        'postprocessing': 'class = argmax(logits), probabilities = softmax',
        'mmauxq_version': __version__,
        'mmauxq_quantizers': json.dumps(quantizers),
    }
    for key, value in entries.items():
        lowered.model.metadata_props.add(key=key, value=value)


def runtime_facts() -> dict[str, Any]:
    """Versions, and what the processor can do."""
    import onnx
    import onnxruntime

    return dict(
        onnxruntime=onnxruntime.__version__,
        onnx=onnx.__version__,
        torch=torch.__version__,
        cpu=cpu_name(),
        cpu_features=cpu_features(),
    )
