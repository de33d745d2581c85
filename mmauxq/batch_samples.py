"""The images of a batch as one tensor, and its targets as others."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmpretrain.structures import DataSample
from torch import Tensor
from torch.utils.data import default_collate


class BatchSamples:
    """The data samples of a batch, which are made when one is looked at.

    A step needs only the labels. To make hundreds of data samples, and to
    read the labels from them, takes the host longer than a GPU needs for a
    step of a small network.

    Args:
        labels: Indices of classes, (N,) int64.
        metainfo: Of each sample, what it says beside its labels.
        scores: Of all classes, (N, K): one-hot labels, or mixed ones.
    """

    def __init__(
        self,
        labels: Tensor,
        metainfo: Sequence[dict] | None = None,
        scores: Tensor | None = None,
    ) -> None:
        self._labels, self._metainfo = labels, metainfo
        self._scores = scores
        self._samples: list[DataSample] | None = None

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64; ``None`` where they are not the :attr:`targets`."""
        return self.targets if self._scores is None else None

    @property
    def targets(self) -> Tensor | None:
        """What a head learns: scores (N, K) if there are, else labels (N,).

        ``None`` once the samples are made, since whoever looks at them may
        change them, as batch augmentations do.
        """
        if self._samples is not None:
            return None
        return self._labels if self._scores is None else self._scores

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> DataSample:
        return self._made()[index]

    def __iter__(self) -> Iterator[DataSample]:
        return iter(self._made())

    def to(self, device: torch.device) -> 'BatchSamples':
        """The same with the labels on a device; itself if they are there, if
        there are scores, and once the samples are made."""
        if self.labels is None or self._labels.device == device:
            return self
        labels = self._labels.to(device, non_blocking=True)
        return BatchSamples(labels, self._metainfo)

    def with_scores(self, scores: Tensor) -> 'BatchSamples':
        """The same with scores (N, K)."""
        return BatchSamples(self._labels, self._metainfo, scores)

    def pin_memory(self) -> 'BatchSamples':
        """The same with pinned labels, as a loader of PyTorch asks for it."""
        return BatchSamples(self._labels.pin_memory(), self._metainfo)

    def _made(self) -> list[DataSample]:
        if self._samples is None:
            self._samples = [labelled(each) for each in self._labels.split(1)]
            for sample, more in zip(
                self._samples, self._metainfo or (), strict=False
            ):
                sample.set_metainfo(more)
            if self._scores is not None:
                for sample, score in zip(
                    self._samples, self._scores, strict=True
                ):
                    sample.set_field(score, 'gt_score', dtype=Tensor)
        return self._samples


def labelled(labels: Tensor) -> DataSample:
    """A data sample with labels (N,), on their device."""
    sample = DataSample()
    # set_gt_label would convert them
    sample.set_field(labels, 'gt_label', dtype=Tensor)
    return sample


def stacked(images: Any) -> Any:
    """A batch (N, C, H, W) of a list of images that are alike; all else is
    returned as it is."""
    if not isinstance(images, (list, tuple)) or not all(
        isinstance(image, Tensor) and image.dim() == 3 for image in images
    ):
        return images
    kinds = {(x.shape, x.dtype, x.device) for x in images}
    return default_collate(list(images)) if len(kinds) == 1 else images
