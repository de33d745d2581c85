"""How kernels divide a tensor among programs."""

from torch import Tensor

from .dispatch import multiprocessors


def power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def is_wide(x: Tensor) -> bool:
    """Whether 32 bits do not count the elements.

    One tile beyond the last element must still be a number.
    """
    return x.numel() + 2**20 >= 2**31


def splits_of(
    blocks: int, columns: int, x: Tensor, programs_each: int
) -> tuple[int, int]:
    """(programs of a column, tiles of each) where programs sum over tiles.

    Args:
        blocks: Tiles in a column.
        columns: Of tiles.
        x: What is divided; says how many programs run at a time.
        programs_each: Programs for each multiprocessor.
    """
    at_once = programs_each * multiprocessors(x.device)
    repeats = -(-blocks // max(1, min(blocks, at_once // columns)))
    return -(-blocks // repeats), repeats
