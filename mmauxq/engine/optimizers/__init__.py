"""Optimizer wrappers and constructors."""

from .cpu_amp_optim_wrapper import CPUAmpOptimWrapper
from .quantizer_aware_constructor import (
    QuantizerAwareOptimWrapperConstructor,
    optimizer_takes,
)

__all__ = [
    'CPUAmpOptimWrapper',
    'QuantizerAwareOptimWrapperConstructor',
    'optimizer_takes',
]
