"""Modules that own scale, clip, offset and bits; functional.py has the
arithmetic."""

from .base import (
    FLOAT_BITS,
    Quantizer,
    keep_positive,
    learned_scales,
    named_quantizers,
    scales_of,
)
from .calibrate import calibrate, uncalibrated
from .dorefa import DoReFaActivation, DoReFaWeight
from .l1_scaled import L1ScaledWeight
from .lsq import LSQ, LearnedStepQuantizer, LSQPlus
from .pact import PACTActivation

__all__ = [
    'FLOAT_BITS',
    'DoReFaActivation',
    'DoReFaWeight',
    'L1ScaledWeight',
    'LSQ',
    'LSQPlus',
    'LearnedStepQuantizer',
    'PACTActivation',
    'Quantizer',
    'calibrate',
    'keep_positive',
    'learned_scales',
    'named_quantizers',
    'scales_of',
    'uncalibrated',
]
