"""What a quantized network is made of: levels, size, cost, gradients."""

from .cost import LayerCost, layer_costs
from .gradients import block_gradient_norms
from .levels import LevelCount, count_levels
from .size import deployed_bytes, quantized_weights

__all__ = [
    'LayerCost',
    'LevelCount',
    'block_gradient_norms',
    'count_levels',
    'deployed_bytes',
    'layer_costs',
    'quantized_weights',
]
