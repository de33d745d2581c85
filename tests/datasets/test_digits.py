import sys

import numpy as np
import pytest

from mmauxq.datasets import Digits
from mmauxq.errors import UsageError

load_digits = pytest.importorskip('sklearn.datasets').load_digits


@pytest.fixture(scope='module')
def splits():
    return {split: Digits(split) for split in ('train', 'test')}


def images(dataset):
    return np.stack([sample['img'] for sample in dataset])


@pytest.mark.parametrize('split, size', [('train', 1198), ('test', 599)])
def test_size(splits, split, size):
    assert len(splits[split]) == size


@pytest.mark.parametrize('split', ['train', 'test'])
def test_images_are_bytes_of_the_full_range(splits, split):
    found = images(splits[split])
    assert (found.dtype, found.shape[1:]) == (np.uint8, (8, 8))
    assert (found.min(), found.max()) == (0, 255)


@pytest.mark.parametrize('split', ['train', 'test'])
def test_every_class_is_there(splits, split):
    labels = splits[split].get_gt_labels()
    assert np.bincount(labels, minlength=10).min() > 50


def test_splits_are_disjoint_and_together_all(splits):
    """Every third is for testing, in the order of scikit-learn."""
    data = load_digits()
    merged = np.zeros(len(data.images), int)
    is_test = np.arange(len(merged)) % 3 == 2
    merged[is_test] = splits['test'].get_gt_labels()
    merged[~is_test] = splits['train'].get_gt_labels()
    assert np.array_equal(merged, data.target)
    assert np.array_equal(
        images(splits['test']), np.round(data.images[is_test] * 15.9375)
    )
    assert np.array_equal(
        images(splits['train']), np.round(data.images[~is_test] * 15.9375)
    )


def test_no_image_is_in_both_splits(splits):
    train, test = (
        {sample['img'].tobytes() for sample in splits[split]}
        for split in ('train', 'test')
    )
    assert train.isdisjoint(test)


def test_the_pipeline_is_applied():
    cfg = dict(type='mmpretrain.PackInputs')
    sample = Digits('test', pipeline=[cfg])[0]
    assert tuple(sample['inputs'].shape) == (1, 8, 8)


def test_classes_have_names(splits):
    assert splits['train'].CLASSES == tuple('0123456789')


def test_bad_split():
    with pytest.raises(UsageError) as error:
        Digits('val')
    assert str(error.value) == (
        "Digits: split: expected one of train, test, got 'val'"
    )


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    with pytest.raises(UsageError) as error:
        Digits('train')
    assert str(error.value) == (
        'this needs the package sklearn, which is not installed: '
        'pip install "mmauxq[digits]"'
    )
