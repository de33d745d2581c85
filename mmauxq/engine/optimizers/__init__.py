"""Optimizer wrappers and constructors."""

from .bfloat16_optim_wrapper import BFloat16OptimWrapper
from .quantizer_aware_constructor import QuantizerAwareOptimWrapperConstructor

__all__ = ['BFloat16OptimWrapper', 'QuantizerAwareOptimWrapperConstructor']
