"""Images that training does not see."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import RepeatDataset
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS as MMPRETRAIN_DATASETS

from mmauxq.datasets import Digits, HeldOut, InMemoryImages
from mmauxq.engine.image_shape import image_shape
from mmauxq.errors import UsageError

DIGITS = dict(type='mmauxq.Digits', split='train')


@MMPRETRAIN_DATASETS.register_module()
class _Numbered(BaseDataset):
    def load_data_list(self):
        return [dict(img=np.full((4, 4), i), gt_label=i) for i in range(10)]


NUMBERED = dict(type='mmpretrain._Numbered', ann_file='')


def labels(part, **more):
    data = HeldOut(NUMBERED, part=part, **(dict(count=3) | more))
    return [data.get_data_info(i)['gt_label'] for i in range(len(data))]


def test_the_parts_are_disjoint_and_together_all():
    order = np.random.default_rng(0).permutation(10)
    assert labels('held_out') == sorted(order[:3])
    assert labels('rest') == sorted(order[3:])
    assert labels('held_out', seed=1) != labels('held_out')
    assert labels('held_out', seed=1) == labels('held_out', seed=1)
    state = np.random.get_state()[1].copy()
    assert labels('rest', count=0) == list(range(10))
    assert (np.random.get_state()[1] == state).all()


def test_it_serves_what_the_data_set_serves():
    held = HeldOut(DIGITS, 100, 'held_out')
    source, indices = Digits('train'), held.repeat_indices
    assert len(held) == len(set(indices)) == 100
    assert len(HeldOut(DIGITS, 100)) == len(source) - 100 == 1098
    assert held.metainfo == source.metainfo
    assert (held[7]['img'] == source[indices[7]]['img']).all()
    assert held.get_cat_ids(7) == [source[indices[7]]['gt_label']]
    twice = RepeatDataset(dict(type='mmauxq.HeldOut', dataset=DIGITS,
                               count=100, part='held_out'), 2)  # fmt: skip
    assert len(twice) == 200


def test_the_pipeline_can_be_another():
    pack = [dict(type='mmpretrain.PackInputs')]
    source = dict(DIGITS, pipeline=[dict(type='mmpretrain.Resize', scale=4)])
    sample = HeldOut(source, 100, 'held_out', pipeline=pack)[0]
    assert tuple(sample['inputs'].shape) == (1, 8, 8)
    assert HeldOut(source, 100)[0]['img'].shape[:2] == (4, 4)


def test_it_is_held_in_memory():
    inside = dict(type='mmauxq.HeldOut', dataset=DIGITS, count=100)
    held = InMemoryImages(dict(inside, part='held_out'))
    rest = InMemoryImages(inside)
    every = InMemoryImages(DIGITS)
    assert (len(held), len(rest)) == (100, 1098)
    both = torch.cat([held.images, rest.images]).flatten(1)
    assert torch.equal(
        both.unique(dim=0), every.images.flatten(1).unique(dim=0)
    )


def test_the_size_of_its_images_is_found():
    """From one image, although more than that are held out."""
    config = Config(
        dict(
            train_dataloader=dict(
                dataset=dict(
                    type='mmauxq.InMemoryImages',
                    dataset=dict(
                        type='mmauxq.HeldOut', dataset=DIGITS, count=100
                    ),
                )
            )
        )
    )
    assert image_shape(config, 'train_dataloader') == (1, 8, 8)


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(count=10), 'count: expected less than 10, .* images, got 10'),
        (dict(count=-1), 'count: expected an integer from 0, got -1'),
        (dict(count=2.0), 'count: expected an integer from 0, got 2.0'),
        (dict(count=1, part='x'), "part: expected one of rest, .* got 'x'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UsageError, match=f'^HeldOut: {message}'):
        HeldOut(NUMBERED, **settings)
