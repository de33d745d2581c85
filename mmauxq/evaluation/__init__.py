"""Looking at what was trained: levels, size, gradients, figures."""

from .gradients import block_gradient_norms
from .levels import LevelCount, count_levels, operand_values
from .size import deployed_bytes
from .statistics import PairedDifference, paired_difference
from .trial import Trial, run_trial

__all__ = [
    'LevelCount',
    'PairedDifference',
    'Trial',
    'block_gradient_norms',
    'count_levels',
    'deployed_bytes',
    'operand_values',
    'paired_difference',
    'run_trial',
]
