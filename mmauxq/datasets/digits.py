from typing import Any

import numpy as np
from mmpretrain.datasets import BaseDataset

from mmauxq.errors import check_choice
from mmauxq.optional import need
from mmauxq.registry import DATASETS


@DATASETS.register_module()
class Digits(BaseDataset):
    """1,797 scanned digits of 8 x 8 pixels, grey values 0 to 255.

    The scikit-learn copy of the test part of the UCI data set "Optical
    Recognition of Handwritten Digits". It has no official split; here every
    third image, 599 in all, is for testing.

    Args:
        split: ``'train'`` (1,198 images) or ``'test'`` (599).
        pipeline: Transforms, as for any mmpretrain data set.
    """

    METAINFO = dict(classes=tuple(str(digit) for digit in range(10)))

    def __init__(
        self, split: str = 'train', pipeline: Any = (), **kwargs: Any
    ) -> None:
        check_choice('Digits: split', split, ('train', 'test'))
        self.split = split
        # it pays off for millions of records; here it takes half a second
        kwargs.setdefault('serialize_data', False)
        super().__init__(
            ann_file='', pipeline=pipeline, test_mode=split == 'test', **kwargs
        )

    def load_data_list(self) -> list[dict]:
        """One ``dict(img=(8, 8) uint8, gt_label=int)`` for each image."""
        need('sklearn')
        from sklearn.datasets import load_digits

        data = load_digits()
        images = np.round(data.images * (255 / 16)).astype(np.uint8)
        is_test = np.arange(len(images)) % 3 == 2
        chosen = is_test if self.split == 'test' else ~is_test
        return [
            dict(img=image, gt_label=int(label))
            for image, label in zip(
                images[chosen], data.target[chosen], strict=True
            )
        ]
