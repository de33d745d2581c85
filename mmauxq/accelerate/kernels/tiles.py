"""How kernels divide a tensor among programs."""

from torch import Tensor

from .dispatch import multiprocessors


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def is_wide(x: Tensor) -> bool:
    """Whether element offsets need 64 bits.

    The offset one tile beyond the last element must still be representable.
    """
    return x.numel() + 2**20 >= 2**31


def split_k(
    blocks: int, columns: int, x: Tensor, programs_each: int
) -> tuple[int, int]:
    """How to split a reduction over tiles among programs.

    Args:
        blocks: Tiles in a column.
        columns: Columns of tiles.
        x: The tensor, on a device with so many multiprocessors.
        programs_each: Programs for each multiprocessor.

    Returns:
        Programs of a column, and tiles of each program.
    """
    at_once = programs_each * multiprocessors(x.device)
    repeats = -(-blocks // max(1, min(blocks, at_once // columns)))
    return -(-blocks // repeats), repeats
