"""How many images a recipe's data loader reads: JPEG files to tensors."""

import os
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from PIL import Image

from mmauxq import compat

from .recipes import recipe

IMAGES, CLASSES = 2000, 1000
SIZE = (500, 375)
"""Width and height, the most frequent of ImageNet."""


def make_image(number: int) -> Image.Image:
    """Noise with the spectrum of photographs: the finer, the weaker.

    At quality 90 a file has 93 KB; those of ImageNet have about 110.

    Args:
        number: Seed; images of different numbers differ.
    """
    random = np.random.default_rng(number)
    width, height = SIZE
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells, strength in ((4, 60), (16, 30), (64, 18), (250, 16), (500, 13)):
        shape = (max(2, cells * height // width), cells, 3)
        coarse = random.integers(256, size=shape, dtype=np.uint8)
        fine = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BILINEAR)
        total += (np.asarray(fine, dtype=np.float32) - 128) * (strength / 74)
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


def _write(path: Path) -> None:
    part = path.with_suffix('.part')
    make_image(int(path.stem)).save(part, format='JPEG', quality=90)
    part.replace(path)


def make_images(folder: Path, count: int = IMAGES) -> Path:
    """Write ``folder/train/CLASS/NUMBER.jpeg`` where it is missing.

    Returns:
        ``folder``.
    """
    paths = [
        folder / 'train' / f'n{number % CLASSES:08}' / f'{number}.jpeg'
        for number in range(count)
    ]
    missing = [path for path in paths if not path.is_file()]
    for number in range(CLASSES):  # the data set expects all of them
        name = f'train/n{number:08}'
        (folder / name).mkdir(parents=True, exist_ok=True)
    if missing:
        with Pool() as pool:
            pool.map(_write, missing, chunksize=16)
    return folder


def measure(
    network: str, workers: int, folder: Path, batches: int, count: int = IMAGES
) -> dict:
    """Images per second of a recipe's training data loader alone.

    The loader is that of the recipe, with another number of processes and an
    endless sampler. The files were written or read just before, so that they
    come from memory, not from a disk.

    Args:
        network: Short name of a network in the recipes, such as ``'r18'``.
        workers: Loader processes.
        folder: Where the files are, or are written.
        batches: Timed batches of each process.
        count: Number of files.
    """
    compat.enable()
    init_default_scope('mmpretrain')
    make_images(folder, count)
    cfg = Config.fromstring(recipe('aux', network), '.py').train_dataloader
    cfg.dataset.data_root = str(folder)
    cfg.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.num_workers = workers
    loader = Runner.build_dataloader(cfg, seed=0)
    stream = iter(loader)
    for _ in range(2 * workers):  # some were fetched ahead
        batch = next(stream)
    start = time.perf_counter()
    for _ in range(batches * workers):
        batch = next(stream)
    seconds = time.perf_counter() - start
    rate = batches * workers * len(batch['inputs']) / seconds
    bytes_ = [path.stat().st_size for path in folder.rglob('*.jpeg')]
    return dict(
        network=network,
        workers=workers,
        batch=len(batch['inputs']),
        images_per_s=round(rate, 1),
        per_worker=round(rate / workers, 1),
        kilobytes=round(sum(bytes_) / len(bytes_) / 1e3, 1),
        shape=list(batch['inputs'][0].shape),
        cores=len(os.sched_getaffinity(0)),
        repeats=batches,
    )
