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

from .benchmark_steps import CONFIGS

IMAGES, CLASSES = 2000, 1000
SIZE = (500, 375)
"""Width and height, the most frequent of ImageNet."""


def make_image(number: int) -> Image.Image:
    """Noise with the spectrum of photographs: detail of all sizes, the finer
    the weaker. At quality 90 a file has 93 KB; ImageNet's have about 110."""
    dice = np.random.default_rng(number)
    width, height = SIZE
    total = np.zeros((height, width, 3), dtype=np.float32)
    for cells, strength in ((4, 60), (16, 30), (64, 18), (250, 16), (500, 13)):
        shape = (max(2, cells * height // width), cells, 3)
        coarse = dice.integers(256, size=shape, dtype=np.uint8)
        fine = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BILINEAR)
        total += (np.asarray(fine, dtype=np.float32) - 128) * (strength / 74)
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


def _write(path: Path) -> None:
    part = path.with_suffix('.part')
    make_image(int(path.stem)).save(part, format='JPEG', quality=90)
    part.replace(path)


def make_images(folder: Path, count: int = IMAGES) -> Path:
    """``folder/train/CLASS/NUMBER.jpeg``; what is there already is left."""
    paths = [
        folder / 'train' / f'n{number % CLASSES:08}' / f'{number}.jpeg'
        for number in range(count)
    ]
    missing = [path for path in paths if not path.is_file()]
    for number in range(CLASSES):  # the data set wants all of them
        name = f'train/n{number:08}'
        (folder / name).mkdir(parents=True, exist_ok=True)
    if missing:
        with Pool() as pool:
            pool.map(_write, missing, chunksize=16)
    return folder


def measure(
    network: str, workers: int, folder: Path, batches: int, count: int = IMAGES
) -> dict:
    """A row: images per second of the recipe's train data loader alone.

    The loader is the recipe's own but for the number of its processes, and
    for a sampler that does not end. The files were just written or read: they
    come from memory, not from a disk.

    Args:
        network: Short name of a network in the recipes.
        workers: Loader processes.
        folder: For the files.
        batches: Of each process, that are timed.
        count: Number of files.
    """
    compat.enable()
    init_default_scope('mmpretrain')
    make_images(folder, count)
    cfg = Config.fromfile(CONFIGS / f'aux_{network}_w4a4.py').train_dataloader
    cfg.dataset.data_root = str(folder)
    cfg.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.num_workers = workers
    loader = Runner.build_dataloader(cfg, seed=0)
    stream = iter(loader)
    for _ in range(2 * workers):  # what was fetched ahead
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
