"""What a quantized network is made of: levels, size, cost, gradients."""

from .cost import deployed_bytes, layer_costs, quantized_weights
from .gradients import block_gradient_norms
from .levels import LevelCount, count_levels

__all__ = [
    'LevelCount',
    'block_gradient_norms',
    'count_levels',
    'deployed_bytes',
    'layer_costs',
    'quantized_weights',
]
