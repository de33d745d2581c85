"""What guides the low-precision network while it trains, and then goes."""

from .aux_adaptor_aggregator import AuxAdaptorAggregator
from .base import Guidance
from .find_taps import Taps, find_taps
from .intermediate_classifiers import IntermediateClassifiers
from .knowledge_distillation import KnowledgeDistillation
from .taps import Tap, TapRecorder

__all__ = [
    'AuxAdaptorAggregator',
    'Guidance',
    'IntermediateClassifiers',
    'KnowledgeDistillation',
    'Tap',
    'TapRecorder',
    'Taps',
    'find_taps',
]
