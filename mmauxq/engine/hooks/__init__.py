"""Schedules and other things that happen at a point in time."""

from .guidance_weight_hook import GuidanceWeightHook
from .safe_checkpoint_hook import SafeCheckpointHook

__all__ = ['GuidanceWeightHook', 'SafeCheckpointHook']
