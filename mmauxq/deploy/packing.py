"""Codes of any width in a dense row of bytes."""

import numpy as np

from mmauxq.errors import UsageError


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes 0 to ``2**bits - 1`` side by side, lowest bit first.

    Args:
        codes: Integers of any shape, read in C order.
        bits: 1 to 8.

    Returns:
        uint8, shape (ceil(number of codes * bits / 8),); the bits left over
        in the last byte are 0.

    Raises:
        UsageError: If a code does not fit.
    """
    flat = np.asarray(codes).reshape(-1)
    if not 1 <= bits <= 8:
        raise UsageError(f'pack: bits: expected 1 to 8, got {bits}')
    if flat.size and not 0 <= flat.min() <= flat.max() < 2**bits:
        raise UsageError(
            f'pack: {bits} bits: expected codes from 0 to {2**bits - 1}, got '
            f'{flat.min()} to {flat.max()}'
        )
    rows = flat.astype(np.uint8)[:, None]
    single = np.unpackbits(rows, axis=1, count=bits, bitorder='little')
    return np.packbits(single.reshape(-1), bitorder='little')


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The ``count`` codes (uint8) that :func:`pack` was given.

    Raises:
        UsageError: If ``packed`` has another length than that many codes.
    """
    size = (count * bits + 7) // 8
    if len(packed) != size:
        raise UsageError(
            f'unpack: {count} codes of {bits} bits: expected {size} bytes, '
            f'got {len(packed)}'
        )
    single = np.unpackbits(packed, count=count * bits, bitorder='little')
    rows = np.zeros((count, 8), np.uint8)
    rows[:, :bits] = single.reshape(count, bits)
    return np.packbits(rows, axis=1, bitorder='little').reshape(-1)
