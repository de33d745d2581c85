"""What a quantized network is made of: levels, size, cost, gradients."""

from .cost import LayerCost, layer_costs
from .gradients import block_gradient_norms
from .levels import LevelCount, count_levels, operand_values
from .size import deployed_bytes

__all__ = [
    'LayerCost',
    'LevelCount',
    'block_gradient_norms',
    'count_levels',
    'deployed_bytes',
    'layer_costs',
    'operand_values',
]
