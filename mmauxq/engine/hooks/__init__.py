"""Schedules and other things that happen at a point in time."""

from .batch_norm_hook import BatchNormHook, reestimate_batch_norm
from .guidance_weight_hook import GuidanceWeightHook

__all__ = ['BatchNormHook', 'GuidanceWeightHook', 'reestimate_batch_norm']
