"""Statistics of a tensor over all ranks, equal to the bit on each."""

from mmengine import dist
from torch import Tensor


def over_ranks(x: Tensor, op: str) -> Tensor:
    """The mean, min or max (``op``) of ``x`` over all ranks, elementwise."""
    if dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, op=op)
    return x
