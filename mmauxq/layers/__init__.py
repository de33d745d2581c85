"""Quantized convolution and linear layers, and the way there and back."""

from .convert import build_quantizer, convert, is_quantizable, restore
from .policy import LayerBits, Policy
from .quantized import QuantizedLayer, quantize_layer, restore_layer

__all__ = [
    'LayerBits',
    'Policy',
    'QuantizedLayer',
    'build_quantizer',
    'convert',
    'is_quantizable',
    'quantize_layer',
    'restore',
    'restore_layer',
]
