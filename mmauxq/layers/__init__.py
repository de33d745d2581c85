"""Quantized layers, and the way from a float network to them and back."""

from .convert import (
    LayerUse,
    build_quantizer,
    convert,
    is_quantizable,
    restore,
)
from .policy import LayerBits, Policy
from .quant_layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantLayer,
    QuantLinear,
    QuantMultiheadAttention,
    WeightReader,
    quant_class,
)

__all__ = [
    'LayerBits',
    'LayerUse',
    'Policy',
    'QuantConv1d',
    'QuantConv2d',
    'QuantConv3d',
    'QuantLayer',
    'QuantLinear',
    'QuantMultiheadAttention',
    'WeightReader',
    'build_quantizer',
    'convert',
    'is_quantizable',
    'quant_class',
    'restore',
]
