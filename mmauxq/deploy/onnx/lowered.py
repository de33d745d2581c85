"""What the lowering of a traced graph gives."""

from dataclasses import dataclass, field

import numpy as np
import onnx


@dataclass
class Lowered:
    """An ONNX model and what had to be decided on the way.

    Args:
        model: The model.
        opset: Its opset.
        weights: ``'typed'`` or ``'int8'``, as it came out.
        containers: Weight quantizer -> type that holds its codes.
        transposed: Weight quantizers whose codes are stored as (in, out).
        zeroed: Weight quantizer -> (out,), channels that a folded batch norm
            multiplies by 0.
        folded: Names of batch norms folded into weights and biases.
        kept: Batch norm -> why it is still there.
        codes: Activation quantizer -> (value with its codes, code of zero).
        float_layers: Quantized layer -> why no integer kernel can run it.
        exact_channels: Output channels whose integer bias changes no code.
        rounded: Layer -> number of channels whose bias is rounded: the codes
            after it may differ from PyTorch's by one, near a threshold.
        reach: Activation quantizer -> how near, in steps, because of that.
    """

    model: onnx.ModelProto = field(default_factory=onnx.ModelProto)
    opset: int = 21
    weights: str = ''
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
