"""Statistics of a tensor over all ranks, equal to the bit on each."""

from functools import partial

from mmengine import dist
from torch import Tensor


def _reduce(x: Tensor, op: str) -> Tensor:
    if dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x, op=op)
    return x


mean_over_ranks = partial(_reduce, op='mean')
min_over_ranks = partial(_reduce, op='min')
max_over_ranks = partial(_reduce, op='max')
