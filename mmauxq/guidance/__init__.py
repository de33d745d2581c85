"""What guides the low-precision network while it trains, and then goes."""

from .aux_adaptor_aggregator import AuxAdaptorAggregator
from .base import Guidance
from .intermediate_classifiers import IntermediateClassifiers
from .taps import Tap, TapRecorder, find_blocks, find_layers, resolve_taps

__all__ = [
    'AuxAdaptorAggregator',
    'Guidance',
    'IntermediateClassifiers',
    'Tap',
    'TapRecorder',
    'find_blocks',
    'find_layers',
    'resolve_taps',
]
