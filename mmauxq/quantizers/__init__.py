"""Modules that own scale, clip, offset and bits; functional.py has the
arithmetic."""

from .base import FLOAT_BITS, Grid, QParams, Quantizer, named_quantizers
from .calibrate import calibrate, uncalibrated
from .dorefa import DoReFaActivation, DoReFaWeight
from .lsq import LSQ, LSQPlus
from .pact import PACTActivation

__all__ = [
    'FLOAT_BITS',
    'DoReFaActivation',
    'DoReFaWeight',
    'Grid',
    'LSQ',
    'LSQPlus',
    'PACTActivation',
    'QParams',
    'Quantizer',
    'calibrate',
    'named_quantizers',
    'uncalibrated',
]
