"""Quantized convolution and linear layers, and the way there and back."""

from .chains import Chains
from .convert import build_quantizer, convert, is_quantizable, restore
from .memory import LessMemory, compiling_for
from .policy import LayerBits, Policy
from .products import Product, ProductTrace
from .quantized import (
    QuantizedLayer,
    WeightReader,
    quantize_layer,
    restore_layer,
)
from .weights_at_once import WeightsAtOnce

__all__ = [
    'Chains',
    'LayerBits',
    'LessMemory',
    'Policy',
    'Product',
    'ProductTrace',
    'QuantizedLayer',
    'WeightReader',
    'WeightsAtOnce',
    'build_quantizer',
    'compiling_for',
    'convert',
    'is_quantizable',
    'quantize_layer',
    'restore',
    'restore_layer',
]
