"""Schedules and other things that happen at a point in time."""

from .batch_norm_hook import BatchNormHook, reestimate_batch_norm
from .checkpoint_fit_hook import CheckpointFitHook
from .data_check_hook import DataCheckHook
from .epoch_length_hook import EpochLengthHook
from .finite_numbers_hook import FiniteNumbersHook
from .guidance_weight_hook import GuidanceWeightHook
from .oscillation_freezing_hook import (
    OscillationFreezing,
    OscillationFreezingHook,
)
from .quantizer_watch_hook import QuantizerWatchHook
from .safe_checkpoint_hook import SafeCheckpointHook
from .teacher_check_hook import TeacherCheckHook
from .transition_rate_hook import TransitionRateHook
from .transition_rate_schedule_hook import (
    TransitionRateSchedule,
    TransitionRateScheduleHook,
)

__all__ = [
    'BatchNormHook',
    'CheckpointFitHook',
    'DataCheckHook',
    'EpochLengthHook',
    'FiniteNumbersHook',
    'GuidanceWeightHook',
    'OscillationFreezing',
    'OscillationFreezingHook',
    'QuantizerWatchHook',
    'SafeCheckpointHook',
    'TeacherCheckHook',
    'TransitionRateHook',
    'TransitionRateSchedule',
    'TransitionRateScheduleHook',
    'reestimate_batch_norm',
]
