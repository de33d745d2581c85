import cv2
import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS as MMPRETRAIN_DATASETS
from mmpretrain.registry import TRANSFORMS

import mmauxq  # noqa: F401
from mmauxq.datasets import Digits, InMemoryImages, collated
from mmauxq.errors import UsageError

DIGITS = dict(type='mmauxq.Digits', split='test')


@MMPRETRAIN_DATASETS.register_module()
class _Listed(BaseDataset):
    def __init__(self, images, **kwargs):
        self.images = images
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self):
        return [dict(img=image, gt_label=1) for image in self.images]


def test_images_and_labels_are_those_of_the_data_set():
    source, held = Digits('test'), InMemoryImages(DIGITS)
    assert len(held) == len(source) == 599
    for index in (0, 100, 598):
        info = source.get_data_info(index)
        sample = held[index]
        assert (sample['inputs'][0].numpy() == info['img']).all()
        assert sample['data_samples'].gt_label.item() == info['gt_label']
    assert held.metainfo['classes'] == source.metainfo['classes']


def test_colour_images():
    images = np.random.default_rng(0).integers(
        256, size=(3, 5, 6, 3), dtype=np.uint8
    )
    held = InMemoryImages(dict(type='_Listed', images=list(images)))
    assert held.images.shape == (3, 3, 5, 6)
    assert (held[2]['inputs'].permute(1, 2, 0).numpy() == images[2]).all()


def test_every_crop_and_flip_is_one_of_those_of_the_transforms():
    """Against mmpretrain's RandomCrop and RandomFlip, all outcomes."""
    image = np.random.default_rng(1).integers(
        1, 256, size=(6, 6), dtype=np.uint8
    )
    padded = np.pad(image, 1)
    possible = set()
    for top in range(3):
        for left in range(3):
            cut = padded[top : top + 6, left : left + 6]
            possible |= {cut.tobytes(), cut[:, ::-1].tobytes()}
    held = InMemoryImages(
        dict(type='_Listed', images=[image]), padding=1, flip=0.5
    )
    torch.manual_seed(0)
    batch = held.__getitems__([0] * 400)['inputs'].numpy()
    assert {cut[0].tobytes() for cut in batch} == possible
    crop = TRANSFORMS.build(dict(type='RandomCrop', crop_size=6, padding=1))
    flip = TRANSFORMS.build(dict(type='RandomFlip', prob=0.5))
    theirs = {
        np.ascontiguousarray(
            flip(crop(dict(img=image[..., None].copy())))['img']
        ).tobytes()
        for _ in range(200)
    }
    assert theirs <= possible


def test_flips_have_their_probability():
    image = np.arange(36, dtype=np.uint8).reshape(6, 6)
    held = InMemoryImages(dict(type='_Listed', images=[image]), flip=0.25)
    torch.manual_seed(0)
    batch = held.__getitems__([0] * 4000)['inputs']
    flipped = (batch[:, 0, 0, 0] != 0).float().mean().item()
    assert flipped == pytest.approx(0.25, abs=0.03)


def test_the_loader_of_the_runner_serves_whole_batches():
    loader = Runner.build_dataloader(
        dict(
            batch_size=100,
            num_workers=0,
            dataset=dict(type='mmauxq.InMemoryImages', dataset=DIGITS),
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='mmauxq.collated'),
        ),
        seed=0,
    )
    batches = list(loader)
    assert [len(b['inputs']) for b in batches] == [100] * 5 + [99]
    assert batches[0]['inputs'].shape == (100, 1, 8, 8)
    labels = torch.cat(
        [s.gt_label for b in batches for s in b['data_samples']]
    )
    expected = [i['gt_label'] for i in Digits('test').load_data_list()]
    assert sorted(labels.tolist()) == sorted(expected)
    assert collated(batches[0]) is batches[0]


def test_batch_augmentation_leaves_nothing_behind():
    held = InMemoryImages(DIGITS)
    held[0]['data_samples'].set_gt_score(torch.zeros(10))
    assert 'gt_score' not in held[0]['data_samples']


def test_images_of_different_sizes_are_refused():
    images = [np.zeros((4, 4), np.uint8), np.zeros((5, 4), np.uint8)]
    with pytest.raises(UsageError, match='expected images of one size, got 2'):
        InMemoryImages(dict(type='_Listed', images=images))


def test_data_sets_without_images_are_refused():
    class Nothing(BaseDataset):
        def load_data_list(self):
            return [dict(gt_label=0)]

    MMPRETRAIN_DATASETS.register_module(module=Nothing, force=True)
    with pytest.raises(
        UsageError, match='expected entries with `img` or .* got none'
    ):
        InMemoryImages(dict(type='Nothing', ann_file=''))


def test_folders_of_images(tmp_path):
    """As MMPretrain's own pipeline reads them."""
    rng = np.random.default_rng(0)
    for name in ('cat/1.png', 'cat/2.png', 'dog/1.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), rng.integers(256, size=(5, 6, 3)))
    folder = dict(type='CustomDataset', data_root=str(tmp_path))
    held = InMemoryImages(dict(folder))
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
    theirs = MMPRETRAIN_DATASETS.build(dict(folder, pipeline=pipeline))
    assert len(held) == len(theirs) == 3
    for mine, other in zip(held, theirs, strict=True):
        assert torch.equal(mine['inputs'], other['inputs'])
        label = mine['data_samples'].gt_label
        assert label == other['data_samples'].gt_label
    assert held.metainfo['classes'] == ('cat', 'dog')
