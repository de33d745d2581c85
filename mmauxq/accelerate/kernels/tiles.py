"""How kernels divide a tensor among programs, and their launch."""

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

LEAST_TILES, LEAST_PROGRAMS = 4, 4
"""Programs that sum get so many tiles each, unless a multiprocessor would
have fewer programs than that."""


def launch(
    kernel: Any, x: Tensor, programs: int, *args: Any, **how: Any
) -> None:
    """Run a kernel on the device of ``x``; products and sums are rounded one
    by one, as torch rounds them."""
    how = {'enable_fp_fusion': False, **how}
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[(programs,)](*args, **how)


def laid_out_like(value: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in the strides of ``x``: itself if it has them already."""
    if value.stride() == x.stride() and value.dtype == dtype:
        return value
    return torch.empty_like(x, dtype=dtype).copy_(value)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def is_wide(x: Tensor) -> bool:
    """Whether offsets need 64 bits, up to one tile beyond the last element."""
    return x.numel() + 2**20 >= 2**31


def tiles(
    x: Tensor, axis: int, size: tuple[int, int]
) -> tuple[int, int, dict[str, int]]:
    """Divide a dense tensor, seen as (rows, channels).

    Args:
        x: The tensor, with its channels along ``axis``.
        size: Elements of a tile, and channels in it at the most.

    Returns:
        Rows of tiles, columns of tiles, and what a kernel is told of them.
    """
    values, width = size
    channels = x.shape[axis]
    rows = x.numel() // channels
    width = min(power_of_two(channels), width) if x.stride(axis) == 1 else 1
    height = min(power_of_two(rows), values // width)
    arguments = dict(
        rows=rows, channels=channels, ROWS=height, CHANNELS=width,
        WIDE=is_wide(x),
    )  # fmt: skip
    return -(-rows // height), -(-channels // width), arguments


def split_tiles(
    x: Tensor, axis: int, size: tuple[int, int], programs_each: int
) -> tuple[int, dict[str, int]]:
    """Like :func:`tiles`, for programs that sum over several tiles each.

    Returns:
        Number of programs, at most about ``programs_each`` for each
        multiprocessor, and the arguments, with ``splits``, the programs of a
        column, and ``repeats``, the tiles of a program.
    """
    blocks, columns, arguments = tiles(x, axis, size)
    processors = multiprocessors(x.device)
    # a small tensor gives few parts, which are then summed up sooner
    enough = blocks * columns // (LEAST_TILES * processors)
    at_once = min(programs_each, max(LEAST_PROGRAMS, enough)) * processors
    repeats = -(-blocks // max(1, min(blocks, at_once // columns)))
    splits = -(-blocks // repeats)
    return splits * columns, dict(arguments, repeats=repeats, splits=splits)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run at a time, for the size of a grid."""
    if device.type != 'cuda':
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
