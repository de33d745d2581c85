"""Tensors in, tensors out: the arithmetic of the quantizers.

What is written here is the definition; a faster form of an op must agree with
it in value and in gradient. Nothing here holds state, and nothing but torch is
imported.
"""

from .dorefa import dorefa_activation, dorefa_weight
from .lsq import learned_step_quantize
from .pact import pact
from .straight_through import LEAST_SCALE, lower_bound, straight_through

__all__ = [
    'LEAST_SCALE',
    'dorefa_activation',
    'dorefa_weight',
    'learned_step_quantize',
    'lower_bound',
    'pact',
    'straight_through',
]
