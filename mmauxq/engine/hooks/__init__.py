"""Schedules and other things that happen at a point in time."""

from .guidance_weight_hook import GuidanceWeightHook
from .teacher_check_hook import TeacherCheckHook

__all__ = ['GuidanceWeightHook', 'TeacherCheckHook']
