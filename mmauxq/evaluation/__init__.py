"""Looking at what was trained: levels, size, gradients, figures."""

from .cost import LayerCost, layer_costs
from .gradients import block_gradient_norms
from .levels import LevelCount, count_levels, operand_values
from .size import deployed_bytes
from .statistics import PairedDifference, paired_difference
from .trial import Trial, run_trial

__all__ = [
    'LayerCost',
    'LevelCount',
    'PairedDifference',
    'Trial',
    'block_gradient_norms',
    'count_levels',
    'deployed_bytes',
    'layer_costs',
    'operand_values',
    'paired_difference',
    'run_trial',
]
