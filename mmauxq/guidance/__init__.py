"""Training-time guidance of the low-precision network; never shipped."""

from .aux_module import AuxAdaptorAggregator
from .base import Guidance
from .block_replacement import BlockReplacement
from .deep_supervision import IntermediateClassifiers
from .distillation import KnowledgeDistillation
from .find_taps import Taps, find_taps
from .taps import Tap, TapRecorder
from .taught import Taught

__all__ = [
    'AuxAdaptorAggregator',
    'BlockReplacement',
    'Guidance',
    'IntermediateClassifiers',
    'KnowledgeDistillation',
    'Tap',
    'TapRecorder',
    'Taps',
    'Taught',
    'find_taps',
]
