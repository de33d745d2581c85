"""Optimizer wrappers, and which parameters decay."""

from .auto_amp_optim_wrapper import AutoAmpOptimWrapper, log_autocast
from .cpu_amp_optim_wrapper import CPUAmpOptimWrapper
from .spared_scales import spare_scales

__all__ = [
    'AutoAmpOptimWrapper',
    'CPUAmpOptimWrapper',
    'log_autocast',
    'spare_scales',
]
