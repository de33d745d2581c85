"""Schedules and other things that happen at a point in time."""

from .guidance_weight_hook import GuidanceWeightHook

__all__ = ['GuidanceWeightHook']
