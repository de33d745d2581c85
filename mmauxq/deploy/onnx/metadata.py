"""What an exported file says of itself."""

import json
from typing import Any

from torch import nn

from mmauxq.quantizers import named_quantizers
from mmauxq.version import __version__

from .graph import Lowered


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
