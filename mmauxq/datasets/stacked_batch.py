"""Batches that leave the processes of a loader as two tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmpretrain.structures import DataSample
from torch import Tensor

from mmauxq.batch_samples import BatchSamples, stacked
from mmauxq.registry import FUNCTIONS


@FUNCTIONS.register_module()
def stacked_batch(samples: Sequence[Any]) -> Any:
    """``collate_fn`` that gives a batch as one tensor of images and one of
    labels.

    MMEngine's ``pseudo_collate`` gives a list of each. The process that
    trains then receives two tensors for every image, each through a file of
    its own, which takes it several milliseconds of a step.

    Args:
        samples: Of the data set. What does not fit stays a list, as in
            ``pseudo_collate``: images that differ in size or dtype, samples
            that hold anything but one class each.
    """
    batch = pseudo_collate(samples)
    if not isinstance(batch, dict):
        return batch
    if 'inputs' in batch:
        batch['inputs'] = stacked(batch['inputs'])
    found = batch.get('data_samples')
    if isinstance(found, list) and all(map(_has_one_class, found)):
        labels = torch.cat([sample.gt_label for sample in found])
        more = [sample.metainfo for sample in found]
        batch['data_samples'] = BatchSamples(labels, more)
    return batch


def _has_one_class(sample: Any) -> bool:
    return (
        type(sample) is DataSample
        and sample.all_keys() == [*sample.metainfo_keys(), 'gt_label']
        and isinstance(sample.gt_label, Tensor)
        and sample.gt_label.dtype == torch.int64
        and sample.gt_label.shape == (1,)
    )
