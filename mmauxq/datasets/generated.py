from collections.abc import Sequence
from typing import Any

import torch
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.utils.data import Dataset

from mmauxq.registry import DATASETS


@DATASETS.register_module()
class GeneratedImages(Dataset):
    """Images of noise with random labels; nothing can be learned from them.

    An image depends on its index alone. Few are kept, so that serving one
    costs next to nothing.

    Args:
        length: Number of images.
        shape: (C, H, W).
        num_classes: K; labels are 0 to K - 1.
        distinct: Number of different images.
        pipeline: Not used; for those who wrap a data set of MMPretrain.
    """

    def __init__(
        self,
        length: int = 1000,
        shape: tuple[int, int, int] = (3, 224, 224),
        num_classes: int = 1000,
        distinct: int = 64,
        pipeline: Sequence = (),
    ) -> None:
        self.length = length
        self.num_classes = num_classes
        self.metainfo = dict(classes=tuple(map(str, range(num_classes))))
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(
            256, (distinct, *shape), dtype=torch.uint8, generator=generator
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor | DataSample]:
        if not 0 <= index < self.length:
            raise IndexError(f'{index} of {self.length} images')
        return dict(
            inputs=self.images[index % len(self.images)],
            data_samples=DataSample().set_gt_label(self._label(index)),
        )

    def get_data_info(self, index: int) -> dict[str, Any]:
        """As of MMPretrain's data sets: ``img``, (H, W, C), and
        ``gt_label``."""
        image = self.images[index % len(self.images)]
        image = image.permute(1, 2, 0).numpy()
        return dict(img=image, gt_label=self._label(index))

    def _label(self, index: int) -> int:
        """It differs between images that look the same."""
        return (index * 7919) % self.num_classes
