"""Batches as two tensors, beside lists of images and samples."""

import copy

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.structures import DataSample
from torch.utils.data import DataLoader, Dataset

from mmauxq.batch_samples import BatchSamples
from mmauxq.datasets import stacked_batch
from mmauxq.engine.prefetch import Batches

COLOURS = dict(mean=[1, 2, 3], std=[2, 3, 4], to_rgb=True, num_classes=5)


def sample(index, size=4, **fields):
    image = torch.full((3, size, size), index, dtype=torch.uint8)
    image[0, index % size] = 9
    made = DataSample(metainfo=dict(img_path=f'{index}.png'))
    return dict(inputs=image, data_samples=made.set_gt_label(index), **fields)


class Images(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return sample(index)


def test_processes_of_a_loader_send_what_lists_hold():
    batches, lists = (
        list(DataLoader(Images(), 2, num_workers=1, collate_fn=collate))
        for collate in (stacked_batch, pseudo_collate)
    )
    assert len(batches) == 3
    for batch, wanted in zip(batches, lists, strict=True):
        assert torch.equal(batch['inputs'], torch.stack(wanted['inputs']))
        assert batch['inputs'].dtype == torch.uint8
        found, samples = batch['data_samples'], wanted['data_samples']
        assert torch.equal(
            found.labels, torch.cat([each.gt_label for each in samples])
        )
        for one, other in zip(found, samples, strict=True):
            assert torch.equal(one.gt_label, other.gt_label)
            assert one.metainfo == other.metainfo


@pytest.mark.parametrize(
    'more',
    [
        {}, dict(to_onehot=True), dict(pad_size_divisor=8),
        dict(batch_augments=dict(augments=dict(type='mmpretrain.Mixup',
                                               alpha=1.0))),
    ],
)  # fmt: skip
@pytest.mark.parametrize('through_loop', [False, True])
def test_preprocessed_they_are_the_same_to_the_bit(more, through_loop):
    found = []
    for collate in (stacked_batch, pseudo_collate):
        torch.manual_seed(0)
        np.random.seed(0)
        preprocessor = ClsDataPreprocessor(**COLOURS, **copy.deepcopy(more))
        batch = collate([sample(i) for i in range(4)])
        if through_loop:
            batches = Batches(iter([batch]), preprocessor=preprocessor)
            batch = batches.take()
            with batches.preprocessing():
                done = preprocessor(batch, True)
        else:
            done = preprocessor(batch, True)
        samples = list(done['data_samples'])
        scores = [each.get('gt_score') for each in samples]
        labels = [each.gt_label for each in samples]
        found.append((done['inputs'], labels, scores))
    (images, labels, scores), wanted = found
    assert torch.equal(images, wanted[0])
    assert all(map(torch.equal, labels, wanted[1]))
    if scores[0] is None:
        assert wanted[2][0] is None
    else:
        assert all(map(torch.equal, scores, wanted[2]))


def test_images_that_differ_stay_a_list():
    batch = stacked_batch([sample(0), sample(1, size=5)])
    assert [image.shape[-1] for image in batch['inputs']] == [4, 5]
    assert batch['data_samples'].labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    'change',
    [
        lambda made: made.set_gt_label([1, 2]),
        lambda made: made.set_gt_score(torch.ones(5)),
        lambda made: made.set_field(torch.ones(1), 'gt_label', dtype=None),
        lambda made: made.pop('gt_label'),
    ],
)
def test_samples_with_anything_else_stay_a_list(change):
    samples = [sample(0), sample(1)]
    change(samples[1]['data_samples'])
    batch = stacked_batch(samples)
    assert batch['inputs'].shape == (2, 3, 4, 4)
    assert batch['data_samples'] == [each['data_samples'] for each in samples]
    assert not isinstance(batch['data_samples'], BatchSamples)


def test_what_is_no_sample_stays():
    assert stacked_batch([1, 2]) == pseudo_collate([1, 2])
    views = [dict(inputs=[torch.ones(3, 2, 2)] * 2)] * 2
    found, wanted = stacked_batch(views), pseudo_collate(views)
    assert len(found['inputs']) == len(wanted['inputs']) == 2
