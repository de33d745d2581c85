"""Scales are set once, from data, before training."""

import copy

import pytest
import torch
from torch import nn

from mmauxq.errors import UsageError
from mmauxq.quantizers import LSQ, calibrate, uncalibrated
from tests.quantizers.test_base import calibrated, learned, same_state


@learned
def test_a_quantizer_that_is_not_reached_stays_uncalibrated(cls, role):
    quantizer = cls(4, role)
    calibrate(quantizer, lambda: None)
    with pytest.raises(UsageError, match='never calibrated'):
        quantizer(torch.rand(4, 5))


@learned
def test_only_the_first_batch_calibrates(cls, role):
    quantizer = calibrated(cls(4, role), torch.rand(4, 5))
    before = copy.deepcopy(quantizer)
    calibrated(quantizer, torch.rand(4, 5) * 100)
    assert same_state(quantizer, before)


@learned
def test_the_first_of_two_tensors_calibrates(cls, role):
    first, second = torch.rand(4, 5), torch.rand(4, 5) * 100
    quantizer, expected = cls(4, role), calibrated(cls(4, role), first)
    calibrate(quantizer, lambda: [quantizer(first), quantizer(second)])
    assert same_state(quantizer, expected)


@learned
def test_a_loaded_quantizer_is_not_calibrated_again(cls, role):
    trained = calibrated(cls(2, role), torch.rand(4, 5))
    loaded = cls(2, role)
    loaded.load_state_dict(trained.state_dict())
    calibrated(loaded, torch.rand(4, 5) * 100)
    assert same_state(loaded, trained)


@learned
def test_calibrating_one_quantizer_is_the_same(cls, role):
    x = torch.rand(4, 5)
    alone = cls(4, role)
    alone.calibrate(x)
    assert same_state(alone, calibrated(cls(4, role), x))
    assert alone.calibrated.item() == 1
    assert torch.equal(alone(x), calibrated(cls(4, role), x)(x))


def test_what_is_calibrated_is_what_the_layers_before_give():
    x = torch.rand(4, 5)
    model = nn.Sequential(LSQ(2), LSQ(4))
    calibrate(model, lambda: model(x))
    first = calibrated(LSQ(2), x)
    second = calibrated(LSQ(4), first(x))
    assert same_state(model, nn.Sequential(first, second))


def test_uncalibrated_names_what_has_no_scale_yet():
    model = nn.ModuleDict({'a': LSQ(2), 'b': LSQ(32), 'c': LSQ(4)})
    assert uncalibrated(model) == {'a': model['a'], 'c': model['c']}
    model['a'].calibrate(torch.rand(3))
    assert list(uncalibrated(model)) == ['c']


def test_a_pass_that_fails_leaves_no_hook():
    quantizer = LSQ(2)

    def fail():
        raise RuntimeError('on purpose')

    with pytest.raises(RuntimeError, match='on purpose'):
        calibrate(quantizer, fail)
    with pytest.raises(UsageError, match='never calibrated'):
        quantizer(torch.rand(3))
