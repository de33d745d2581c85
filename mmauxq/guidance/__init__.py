"""Training-time guidance of the low-precision network; never shipped."""

from .aux_module import AuxAdaptorAggregator
from .base import Guidance
from .deep_supervision import IntermediateClassifiers
from .distillation import KnowledgeDistillation
from .find_taps import Taps, find_taps
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
