"""Image files, read once by several processes."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np

from mmauxq.errors import UsageError

CHUNK = 256
"""Files that a process reads at a time."""


def read_images(
    paths: Sequence[str], processes: int | None = None
) -> np.ndarray:
    """Read image files of one size, as ``LoadImageFromFile`` does.

    Args:
        paths: The files.
        processes: How many read; by default one for each core.

    Returns:
        (N, H, W, 3) uint8, blue first.

    Raises:
        UsageError: If a file cannot be read, if sizes differ, or if the images
            need more memory than there is; before most of them are read.
    """
    first = _read(paths[0])
    _check_memory(len(paths), first)
    images = np.empty((len(paths), *first.shape), np.uint8)
    cores = len(os.sched_getaffinity(0))
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    count = min(processes or cores, len(chunks))
    if count == 1:
        for i, path in enumerate(paths):
            images[i] = _of_size(path, first.shape)
        return images
    from rich.progress import track

    # the first process may have made threads and used a GPU; these children
    # decode files, and nothing else
    with ProcessPoolExecutor(count, get_context('fork')) as pool:
        parts = pool.map(_read_chunk, chunks, [first.shape] * len(chunks))
        start = 0
        for part in track(
            parts, 'reading images', len(chunks), transient=True
        ):
            images[start : start + len(part)] = part
            start += len(part)
    return images


def _read_chunk(paths: Sequence[str], shape: tuple[int, ...]) -> np.ndarray:
    cv2.setNumThreads(0)
    return np.stack([_of_size(path, shape) for path in paths])


def _of_size(path: str, shape: tuple[int, ...]) -> np.ndarray:
    image = _read(path)
    if image.shape != shape:
        raise UsageError(
            'InMemoryImages: expected images of one size, '
            f'{_size(shape)} as the first, got {_size(image.shape)} in {path}'
        )
    return image


def _read(path: str) -> np.ndarray:
    image = cv2.imread(str(path))
    if image is None:
        reason = 'is no image' if Path(path).is_file() else 'does not exist'
        raise UsageError(f'InMemoryImages: {path} {reason}')
    return image


def _size(shape: tuple[int, ...]) -> str:
    return f'{shape[1]} x {shape[0]} pixels'


def _check_memory(count: int, image: np.ndarray) -> None:
    needed, free = count * image.nbytes, _free_memory()
    if needed > free:
        raise UsageError(
            f'InMemoryImages: {count} images of {_size(image.shape)} need '
            f'{needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are '
            'free; use the data set itself, with num_workers'
        )


def _free_memory() -> float:
    """Bytes, as far as the system says."""
    try:
        lines = Path('/proc/meminfo').read_text().splitlines()
    except OSError:  # not Linux
        return float('inf')
    (line,) = (line for line in lines if line.startswith('MemAvailable'))
    return int(line.split()[1]) * 1024
