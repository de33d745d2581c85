"""How many images a recipe's data loader reads: JPEG files to tensors."""

import os
import time
from collections.abc import Iterable
from multiprocessing import Pool, active_children
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from mmauxq import compat

from . import decoders
from .recipes import DECODERS, recipe

IMAGES, CLASSES = 2000, 1000
SIZE = (500, 375)
"""Width and height, the most frequent of ImageNet."""

PLAIN = DECODERS[0]
BATCHES_A_TURN = 4
"""Of each process, before another decoder takes its turn."""


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
    network: str,
    workers: int,
    folder: Path,
    batches: int,
    count: int = IMAGES,
    decoder: str = PLAIN,
) -> dict:
    """Images per second of a recipe's training data loader alone.

    The loader is that of the recipe, with another number of processes. The
    files were written or read just before, so that they come from memory, not
    from a disk. Another decoder takes turns with OpenCV, so that their ratio
    holds on a machine that others use.

    Args:
        network: Short name of a network in the recipes, such as ``'r18'``.
        workers: Loader processes.
        folder: Where the files are, or are written.
        batches: Timed batches of each process.
        count: Number of files.
        decoder: One of ``recipes.DECODERS``.
    """
    compat.enable()
    init_default_scope('mmpretrain')
    cv2.setNumThreads(0)  # as MMEngine's runner does
    make_images(folder, count)
    cfg = Config.fromstring(recipe('aux', network), '.py').train_dataloader
    cfg.dataset.data_root = str(folder)
    cfg.num_workers = workers
    each = min(batches, BATCHES_A_TURN)
    images = each * workers * cfg.batch_size
    arms = {
        name: Arm(decoders.build(name, cfg, images), images)
        for name in dict.fromkeys((PLAIN, decoder))
    }
    turns = -(-batches // each)
    for turn in range(turns + 1):
        for arm in list(arms.values())[:: -1 if turn % 2 else 1]:
            arm.take_turn()
    arm = arms[decoder]
    seconds, processor = (np.array(v[1:]) for v in (arm.wall, arm.processor))
    of_opencv = processor / np.array(arms[PLAIN].processor[1:])
    receiver = np.array(arm.receiver[1:])
    receiver_of_opencv = receiver / np.array(arms[PLAIN].receiver[1:])
    rate = images / float(np.median(seconds))
    bytes_ = [path.stat().st_size for path in folder.rglob('*.jpeg')]
    return dict(
        network=network,
        decoder=decoder,
        workers=workers,
        batch=cfg.batch_size,
        images_per_s=round(rate, 1),
        per_worker=round(rate / workers, 1),
        processor_ms=_spread(processor * 1e3 / images),
        of_opencv=_spread(of_opencv),
        receiver_ms=_spread(receiver * 1e3 / images),
        receiver_of_opencv=_spread(receiver_of_opencv),
        kilobytes=round(sum(bytes_) / len(bytes_) / 1e3, 1),
        shape=arm.shape,
        cores=len(os.sched_getaffinity(0)),
        repeats=turns,
    )


class Arm:
    """A loader, the processes that it starts, and the seconds of its turns.

    Args:
        loader: Of :func:`.decoders.build`.
        images: How many an iteration of it gives.
    """

    def __init__(self, loader: Iterable[dict], images: int) -> None:
        self.loader, self.images = loader, images
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.receiver: list[float] = []  # of the process that would train
        self.processes: set | None = None

    def take_turn(self) -> None:
        """Read all images once; the loader's processes idle afterwards."""
        others = {process.pid for process in active_children()}
        start, before = time.perf_counter(), self._processor_time()
        own = time.process_time()
        given = 0
        for batch in self.loader:
            given += len(batch['inputs'])
        self.wall.append(time.perf_counter() - start)
        self.receiver.append(time.process_time() - own)
        if given != self.images:
            raise RuntimeError(f'expected {self.images} images, got {given}')
        self.shape = list(batch['inputs'][0].shape)
        if self.processes is None:  # the first turn starts them
            now = {process.pid for process in active_children()}
            self.processes = now - others
        self.processor.append(self._processor_time() - before)

    def _processor_time(self) -> float:
        # clock_getcpuclockid(3), which Python has for threads only
        clocks = [~pid << 3 | 2 for pid in self.processes or ()]
        return time.process_time() + sum(map(time.clock_gettime, clocks))


def _spread(values: np.ndarray) -> list[float]:
    """Median, smallest and largest."""
    three = np.median(values), values.min(), values.max()
    return [round(float(value), 3) for value in three]
