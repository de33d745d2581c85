"""Modules that own scale, clip, offset and bits; the arithmetic is in ops."""

from .base import FLOAT_BITS, Quantizer, calibrating, named_quantizers
from .dorefa import DoReFaActivation, DoReFaWeight
from .grid import Grid
from .lsq import LSQ
from .lsq_plus import LSQPlus
from .pact import PACTActivation

__all__ = [
    'FLOAT_BITS',
    'DoReFaActivation',
    'DoReFaWeight',
    'Grid',
    'LSQ',
    'LSQPlus',
    'PACTActivation',
    'Quantizer',
    'calibrating',
    'named_quantizers',
]
