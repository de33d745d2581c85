from collections.abc import Sequence

import numpy as np
from mmengine.dataset import BaseDataset, ClassBalancedDataset

from mmauxq.errors import UsageError, check_choice, check_integer
from mmauxq.registry import DATASETS

PARTS = ('rest', 'held_out')


@DATASETS.register_module()
class HeldOut(ClassBalancedDataset):
    """Images of a data set that are held out at random, or the rest of them.

    Each image is in one of the two parts, in the order of the data set. This
    is MMEngine's wrapper that repeats images, here once or not at all.

    Args:
        dataset: Config of a data set, or one that is built.
        count: Number of images that are held out.
        part: ``'rest'``, or ``'held_out'``.
        seed: Of the choice; it moves no other generator.
        pipeline: In place of that in the config of the data set.

    Raises:
        UsageError: If the data set has no more images than ``count``.
    """

    def __init__(
        self,
        dataset: dict | BaseDataset,
        count: int,
        part: str = 'rest',
        seed: int = 0,
        pipeline: Sequence | None = None,
    ) -> None:
        check_choice('HeldOut: part', part, PARTS)
        check_integer('HeldOut: count', count, 0)
        self.count, self.part, self.seed = count, part, seed
        if pipeline is not None:
            dataset = dict(dataset, pipeline=pipeline)
        super().__init__(dataset, oversample_thr=0.0)

    def _get_repeat_factors(
        self, dataset: BaseDataset, repeat_thr: float
    ) -> list[float]:
        images = len(dataset)
        if self.count >= images:
            raise UsageError(
                f'HeldOut: count: expected less than {images}, the number of '
                f'images, got {self.count}'
            )
        chosen = np.full(images, self.part == 'rest')
        order = np.random.default_rng(self.seed).permutation(images)
        chosen[order[: self.count]] = self.part == 'held_out'
        return chosen.astype(float).tolist()
