"""Tokens as images: between (N, L, C) and (N, C, H, W)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def extra_tokens(count: int) -> int:
    """How many class and distillation tokens stand before a square image; 0 if
    the others are no square."""
    extra = count - math.isqrt(count) ** 2
    return extra if extra <= 2 else 0


def to_map(tokens: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """(N, L, C) to (N, C, H, W), without the extra tokens, of ``size`` (H, W)
    if it has as many positions, else a square or one row."""
    tokens = tokens[:, extra_tokens(tokens.shape[1]) :].transpose(1, 2)
    if size is not None and size[0] * size[1] == tokens.shape[2]:
        return tokens.unflatten(2, tuple(size))
    side = math.isqrt(tokens.shape[2])
    if side * side != tokens.shape[2]:
        side = 1
    return tokens.unflatten(2, (side, -1))


def resize_tokens(tokens: Tensor, count: int) -> Tensor:
    """(N, L, C) to (N, count, C): pooled as an image if both are square; extra
    tokens are carried along, missing ones start as the mean."""
    if tokens.shape[1] == count:
        return tokens
    extra, wanted = extra_tokens(tokens.shape[1]), extra_tokens(count)
    side = math.isqrt(count - wanted)
    image = to_map(tokens)
    size = (side, side)
    if 1 in (side, image.shape[-2]) or side * side != count - wanted:
        size, image = (1, count - wanted), image.flatten(2).unsqueeze(2)
    pooled = F.adaptive_avg_pool2d(image, size).flatten(2).transpose(1, 2)
    first = tokens[:, : min(extra, wanted)]
    missing = wanted - first.shape[1]
    mean = pooled.mean(1, keepdim=True).expand(-1, missing, -1)
    return torch.cat([first, mean, pooled], 1)
