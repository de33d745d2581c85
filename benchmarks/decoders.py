"""Ways from JPEG files to batches of images, by what decodes."""

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import mmcv
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import ConfigDict
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner
from torch.utils.data import RandomSampler
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from mmauxq.errors import UsageError

SIZE = 224


@TRANSFORMS.register_module()
class LoadByTorchvision(BaseTransform):
    """``LoadImageFromFile`` with torchvision's decoder, on the CPU."""

    def transform(self, results: dict) -> dict:
        """Add ``img``, uint8 of shape (H, W, 3), blue first."""
        data = read_file(results['img_path'])
        image = decode_jpeg(data, ImageReadMode.RGB).permute(1, 2, 0)
        shape = image.shape[:2]
        return results | dict(
            img=image.numpy()[:, :, ::-1], img_shape=shape, ori_shape=shape
        )


@TRANSFORMS.register_module()
class ReadFile(BaseTransform):
    """The bytes of a file, for a decoder outside of the loader processes."""

    def transform(self, results: dict) -> dict:
        """Give ``inputs``, a uint8 vector."""
        return dict(inputs=read_file(results['img_path']))


def _mmcv(**options: object) -> dict:
    return dict(type='LoadImageFromFile', **options)


LOADS: dict[str, dict] = {
    'opencv': _mmcv(),
    'opencv-stacked': _mmcv(),
    'opencv-half': _mmcv(color_type=cv2.IMREAD_REDUCED_COLOR_2),
    'opencv-quarter': _mmcv(color_type=cv2.IMREAD_REDUCED_COLOR_4),
    'pillow': _mmcv(imdecode_backend='pillow'),
    'turbojpeg': _mmcv(imdecode_backend='turbojpeg'),
    'torchvision': dict(type='LoadByTorchvision'),
}
"""Decoder in the loader processes -> first transform of the pipeline."""

PACKAGES = {
    'turbojpeg': ('turbojpeg', 'PyTurboJPEG'),
    'dali': ('nvidia.dali', 'nvidia-dali-cuda130'),
    'dali-cpu': ('nvidia.dali', 'nvidia-dali-cuda130'),
}
"""Decoder -> module that it needs, and what to give to ``pip install``."""


def check(decoder: str) -> None:
    """Raise UsageError if a decoder of ``recipes.DECODERS`` cannot run here.

    One line says which package, library or device is missing.
    """
    module, package = PACKAGES.get(decoder, ('torch', 'torch'))
    try:
        importlib.import_module(module)
        if decoder == 'turbojpeg':
            mmcv.use_backend('turbojpeg')
    except ImportError as error:
        raise UsageError(
            f'the decoder {decoder} needs the package {package}: pip install '
            f'{package} ({error})'
        ) from None
    except RuntimeError as error:  # the package is there, its library is not
        raise UsageError(
            f'the decoder {decoder} needs the library libturbojpeg (Debian: '
            f'libturbojpeg0, for PyTurboJPEG below 2): {error}'.splitlines()[0]
        ) from None
    if decoder in ('torchvision-gpu', 'dali') and not (
        torch.cuda.is_available()
    ):
        raise UsageError(f'the decoder {decoder} needs a GPU; none is here')


def build(decoder: str, loader: ConfigDict, images: int) -> Any:
    """What gives batches of ``images`` images, each time it is iterated.

    Args:
        decoder: One of ``recipes.DECODERS``.
        loader: Config of a training loader, with its number of processes.
        images: Number of images, a multiple of the batch size.
    """
    check(decoder)
    root = Path(loader.dataset.data_root, 'train')
    if decoder.startswith('dali'):
        device = 'cpu' if decoder == 'dali-cpu' else 'gpu'
        return Dali(
            root, loader.batch_size, loader.num_workers, images, device
        )
    loader = copy.deepcopy(loader)
    files = range(len(list(root.rglob('*.jpeg'))))
    loader.sampler = RandomSampler(files, replacement=True, num_samples=images)
    loader.persistent_workers = True  # an iteration is one of many
    if decoder in LOADS:
        loader.dataset.pipeline[0] = LOADS[decoder]
        if decoder == 'opencv-stacked':  # as the recipes do by default
            loader.collate_fn = dict(type='mmauxq.stacked_batch')
        return Runner.build_dataloader(loader, seed=0)
    loader.dataset.pipeline = [dict(type='ReadFile')]
    loader.collate_fn = dict(type='pseudo_collate')
    return ByTorchvision(Runner.build_dataloader(loader, seed=0), 'cuda')


class ByTorchvision:
    """Batches decoded, cropped and flipped by torchvision on a GPU.

    Args:
        loader: Gives ``inputs``, lists of vectors of bytes.
        device: Where the images are decoded.
    """

    def __init__(self, loader: Any, device: str) -> None:
        self.loader, self.device = loader, device
        self.transform = v2.Compose(
            [v2.RandomResizedCrop(SIZE, antialias=False),
             v2.RandomHorizontalFlip()]
        )  # fmt: skip

    def __iter__(self) -> Iterator[dict]:
        for batch in self.loader:
            images = decode_jpeg(
                batch['inputs'], ImageReadMode.RGB, device=self.device
            )
            inputs = torch.stack([self.transform(image) for image in images])
            yield dict(inputs=inputs)
        if self.device == 'cuda':
            torch.cuda.synchronize()


class Dali:
    """Batches decoded, cropped and flipped by NVIDIA DALI.

    Threads of this process do it, and no loader process.

    Args:
        root: Folder with a folder of files for each class.
        batch_size: Images in a batch.
        threads: Of the CPU.
        images: Number of images that an iteration gives.
        device: ``'gpu'`` or ``'cpu'``.
    """

    def __init__(
        self, root: Path, batch_size: int, threads: int, images: int,
        device: str,
    ) -> None:  # fmt: skip
        from nvidia.dali import Pipeline, fn, types

        on_gpu = device == 'gpu'
        self.batches = images // batch_size
        self.pipeline = Pipeline(
            batch_size, threads, device_id=0 if on_gpu else None, seed=0
        )
        with self.pipeline:
            files, labels = fn.readers.file(
                file_root=str(root), random_shuffle=True
            )
            decoded = fn.decoders.image_random_crop(
                files, device='mixed' if on_gpu else 'cpu',
                random_area=(0.08, 1), random_aspect_ratio=(3 / 4, 4 / 3),
            )  # fmt: skip
            resized = fn.resize(decoded, size=(SIZE, SIZE), antialias=False)
            flipped = fn.crop_mirror_normalize(
                resized, mirror=fn.random.coin_flip(), dtype=types.UINT8,
                output_layout='CHW',
            )  # fmt: skip
            self.pipeline.set_outputs(flipped, labels)
        self.pipeline.build()

    def __iter__(self) -> Iterator[dict]:
        # as many as are wanted are begun, so that nothing is computed in the
        # time of another decoder
        begun = 0
        for done in range(self.batches):
            while begun < min(done + 2, self.batches):
                self.pipeline.schedule_run()
                begun += 1
            images, _ = self.pipeline.share_outputs()
            yield dict(
                inputs=torch.stack([torch.as_tensor(i) for i in images])
            )
            self.pipeline.release_outputs()
