from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmpretrain.registry import DATASETS as MMPRETRAIN_DATASETS
from torch import Tensor
from torch.utils.data import Dataset

from mmauxq.batch_samples import BatchSamples
from mmauxq.errors import UsageError
from mmauxq.registry import DATASETS, FUNCTIONS

from .read_images import read_images


@DATASETS.register_module()
class InMemoryImages(Dataset):
    """Another data set, held on the device, and cut and flipped in batches.

    The wrapped data set is read once, without its pipeline; a batch is then
    one gather on the device. To be used with ``num_workers=0`` and
    ``collate_fn=dict(type='mmauxq.collated')``; samplers are the usual ones.

    Args:
        dataset: Config of an mmpretrain data set whose entries hold ``img``,
            (H, W) or (H, W, C) uint8, or ``img_path``, a file, and
            ``gt_label``. All images have one size. Files are read by several
            processes, as ``LoadImageFromFile`` reads them: blue first.
        padding: Width of the black border before the random crop back to the
            size of the images, as ``RandomCrop(padding=...)`` does it; 0 for
            no crop.
        flip: Probability of a horizontal flip.
        device: Where the images are; ``'auto'`` for the GPU if there is one.

    Raises:
        UsageError: If images differ in size, a file cannot be read, entries
            lack an image, or there is too little memory.
    """

    def __init__(
        self,
        dataset: dict,
        padding: int = 0,
        flip: float = 0.0,
        device: str = 'auto',
    ) -> None:
        config = dict(dataset, pipeline=[])
        config.setdefault('_scope_', 'mmpretrain')
        source = MMPRETRAIN_DATASETS.build(config)
        if device == 'auto':
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.metainfo = source.metainfo
        self.padding, self.flip = padding, flip
        infos = [source.get_data_info(i) for i in range(len(source))]
        self.images = _stack(infos).to(device)
        labels = torch.tensor([int(i['gt_label']) for i in infos])
        self._labels = labels.to(device)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self.__getitems__([index])
        return {key: values[0] for key, values in batch.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """A batch for PyTorch's loader: inputs (N, C, H, W) uint8, and N data
        samples. Crops and flips come from the CPU's default generator."""
        drawn = [torch.as_tensor(indices)]
        if self.padding or self.flip:
            count = len(indices)
            drawn += torch.randint(2 * self.padding + 1, (2, count))
            drawn.append(torch.rand(count).lt(self.flip).long())
        # together: each transfer costs the host as much as a whole operation
        chosen, *places = self._send(torch.stack(drawn))
        images = self.images[chosen]
        if places:
            images = self._augment(images, *places)
        samples = BatchSamples(self._labels[chosen])
        return dict(inputs=images, data_samples=samples)

    def _send(self, values: Tensor) -> Tensor:
        """Move to the device of the images; the host does not wait."""
        device = self.images.device
        if device.type == 'cuda':
            values = values.pin_memory()
        return values.to(device, non_blocking=True)

    def _augment(
        self, images: Tensor, top: Tensor, left: Tensor, flipped: Tensor
    ) -> Tensor:
        """Cut at ``top`` and ``left`` of the padded images, and flip those
        whose ``flipped`` is 1; each (N,)."""
        count, _, height, width = images.shape
        device = images.device
        images = torch.nn.functional.pad(images, [self.padding] * 4)
        rows = top[:, None] + torch.arange(height, device=device)
        columns = torch.arange(width, device=device).expand(count, width)
        columns = left[:, None] + torch.where(
            flipped[:, None].bool(), columns.flip(1), columns
        )
        sample = torch.arange(count, device=device)[:, None, None]
        # advanced indices first, channels last: (N, H, W, C)
        cut = images[sample, :, rows[:, :, None], columns[:, None, :]]
        return cut.permute(0, 3, 1, 2).contiguous()


def _stack(infos: list[dict]) -> Tensor:
    """The images of entries, (N, C, H, W)."""
    if infos and 'img' in infos[0]:
        sizes = {np.shape(info['img']) for info in infos}
        if len(sizes) > 1:
            raise UsageError(
                'InMemoryImages: expected images of one size, got '
                f'{len(sizes)} sizes'
            )
        images = np.stack([info['img'] for info in infos])
    elif infos and 'img_path' in infos[0]:
        images = read_images([info['img_path'] for info in infos])
    else:
        raise UsageError(
            'InMemoryImages: dataset: expected entries with `img` or '
            '`img_path`, as in CIFAR10, CustomDataset or mmauxq.Digits, got '
            'none'
        )
    stacked = torch.from_numpy(images)
    if stacked.dim() == 3:
        stacked = stacked[..., None]
    return stacked.permute(0, 3, 1, 2).contiguous()


@FUNCTIONS.register_module()
def collated(batch: dict) -> dict:
    """``collate_fn`` for data sets that serve whole batches."""
    return batch
