"""Optimizer wrappers, and which parameters decay."""

from .cpu_amp_optim_wrapper import CPUAmpOptimWrapper
from .spared_scales import spare_scales

__all__ = ['CPUAmpOptimWrapper', 'spare_scales']
