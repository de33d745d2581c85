"""The labels of a batch, as one tensor."""

from collections.abc import Iterator

from mmpretrain.structures import DataSample
from torch import Tensor


class BatchSamples:
    """The data samples of a batch, which are made when one is looked at.

    A step needs only the labels. To make hundreds of data samples, and to
    read the labels from them, takes the host longer than a GPU needs for a
    step of a small network.

    Args:
        labels: Indices of classes, (N,) int64.
    """

    def __init__(self, labels: Tensor) -> None:
        self._labels = labels
        self._samples: list[DataSample] | None = None

    @property
    def labels(self) -> Tensor | None:
        """(N,) int64; ``None`` once the samples are made, since whoever looks
        at them may change them, as batch augmentations do."""
        return self._labels if self._samples is None else None

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> DataSample:
        return self._made()[index]

    def __iter__(self) -> Iterator[DataSample]:
        return iter(self._made())

    def _made(self) -> list[DataSample]:
        if self._samples is None:
            self._samples = [labelled(each) for each in self._labels.split(1)]
        return self._samples


def labelled(labels: Tensor) -> DataSample:
    """A data sample with labels (N,), on their device."""
    sample = DataSample()
    # set_gt_label would convert them
    sample.set_field(labels, 'gt_label', dtype=Tensor)
    return sample
