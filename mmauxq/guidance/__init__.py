"""What guides the low-precision network while it trains, and then goes."""

from .aux_adaptor_aggregator import AuxAdaptorAggregator
from .base import Guidance
from .taps import Tap, TapRecorder, find_blocks, find_layers, resolve_taps

__all__ = [
    'AuxAdaptorAggregator',
    'Guidance',
    'Tap',
    'TapRecorder',
    'find_blocks',
    'find_layers',
    'resolve_taps',
]
