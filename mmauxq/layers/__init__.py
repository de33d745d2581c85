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
    QuantLayer,
    QuantMultiheadAttention,
    WeightReader,
    quant_class,
)

__all__ = [
    'LayerBits',
    'LayerUse',
    'Policy',
    'QuantLayer',
    'QuantMultiheadAttention',
    'WeightReader',
    'build_quantizer',
    'convert',
    'is_quantizable',
    'quant_class',
    'restore',
]
