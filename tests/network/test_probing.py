"""A network is run, and nothing tells it afterwards."""

import random
import warnings

import numpy as np
import pytest
import torch
from mmpretrain.registry import MODELS
from torch import nn

from mmauxq.algorithms import JointQAT
from mmauxq.network import (
    forked_generators,
    probing,
    restoring,
    sample_images,
    seed_generators,
)
from mmauxq.quantizers import LSQ, uncalibrated
from tests.networks import AUX, QUANTIZERS, SHAPE, batch, classifier

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture
def network():
    return MODELS.build(classifier()).to(DEVICE)


def draw():
    """From every generator that a network may use."""
    return (
        random.random(),
        np.random.rand(),
        torch.rand(1).item(),
        torch.rand(1, device=DEVICE).item(),
    )


def seed():
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


CONTEXTS = [forked_generators, restoring, probing]
each_context = pytest.mark.parametrize('context', CONTEXTS)


@each_context
def test_random_numbers_go_on_as_if_nothing_was(network, context):
    seed()
    expected = draw()
    seed()
    with context(network):
        draw()
    assert draw() == expected


@each_context
def test_also_where_the_network_seeds_or_fails(network, context):
    """RevViT seeds by the clock."""
    seed()
    expected = draw()
    seed()
    with pytest.raises(RuntimeError, match='stop'), context(network):
        random.seed(), np.random.seed(), torch.seed()
        raise RuntimeError('stop')
    assert draw() == expected


@pytest.fixture
def one_gpu_at_a_time(monkeypatch):
    """``torch.manual_seed`` seeds all GPUs, also one that is used later."""
    for name in ('manual_seed_all', 'seed_all'):
        monkeypatch.setattr(
            torch.cuda, name, lambda *_: pytest.fail('seeds all GPUs')
        )


@each_context
def test_other_gpus_are_left_alone(network, context, one_gpu_at_a_time):
    with context(network):
        seed_generators(network)
        draw()


def test_also_where_a_network_is_built_and_calibrated(one_gpu_at_a_time):
    architecture = MODELS.build(classifier())
    model = JointQAT(architecture, QUANTIZERS, guidance=AUX, input_shape=SHAPE)
    model.calibrate(batch()[0])
    assert uncalibrated(model) == {}


def test_generators_are_seeded(network):
    found = []
    for _ in range(2):
        seed_generators(network)
        found.append([torch.rand(1).item(), torch.rand(1, device=DEVICE)])
    assert found[0] == found[1]
    seed_generators(network, seed=1)
    assert torch.rand(1).item() != found[0][0]


def test_a_probe_starts_from_the_same_numbers(network):
    found = []
    for start in (3, 4):
        torch.manual_seed(start)
        with probing(network):
            found.append(torch.rand(5))
    assert torch.equal(*found)


@pytest.mark.parametrize('context', [restoring, probing])
def test_buffers_and_modes_are_restored(network, context):
    network.backbone.layer1.eval()  # as a frozen stage
    modes = [m.training for m in network.modules()]
    values = [b.clone() for b in network.buffers()]
    places = [b.data_ptr() for b in network.buffers()]
    with context(network):
        network.train()
        network(torch.randn(4, *SHAPE, device=DEVICE), mode='tensor')
        assert any(
            not torch.equal(b, v)
            for b, v in zip(network.buffers(), values, strict=True)
        )
        network.eval()
    assert [m.training for m in network.modules()] == modes
    assert [b.data_ptr() for b in network.buffers()] == places
    for buffer, value in zip(network.buffers(), values, strict=True):
        assert torch.equal(buffer, value)


@pytest.mark.parametrize('context', [restoring, probing])
def test_buffers_are_restored_where_the_pass_fails(network, context):
    norm = network.backbone.bn1
    with pytest.raises(RuntimeError, match='stop'), context(network):
        norm.running_mean.add_(1)
        norm.train(not norm.training)
        raise RuntimeError('stop')
    assert not norm.running_mean.any()
    assert norm.training


def test_what_a_quantizer_learns_stays():
    """Calibration runs inside."""
    model = nn.Sequential(LSQ(2), nn.BatchNorm1d(3))
    x = torch.randn(4, 3)
    with restoring(model):
        model[0].calibrate(x)
        model(x)
    assert model[0].calibrated.item() == 1
    assert model[0].signed.item() == 1
    assert model[1].num_batches_tracked == 0


def test_what_a_module_of_a_quantizer_keeps_stays():
    quantizer = LSQ(2)
    quantizer.inner = nn.BatchNorm1d(3)
    with restoring(nn.Sequential(quantizer)):
        quantizer.inner(torch.randn(4, 3))
    assert quantizer.inner.num_batches_tracked == 1


def test_a_buffer_that_did_not_change_is_not_written(network):
    version = network.backbone.bn1.running_mean._version
    with restoring(network):
        pass
    assert network.backbone.bn1.running_mean._version == version


def test_several_modules_at_once(network):
    other = nn.BatchNorm1d(3).eval()
    with restoring(network, other):
        other.train()(torch.randn(4, 3))
    assert not other.training
    assert other.num_batches_tracked == 0


def test_a_probe_is_in_evaluation_mode_without_gradient(network):
    with probing(network):
        assert not any(m.training for m in network.modules())
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_a_training_probe_trains_the_backbone_but_no_batch_norm(network):
    with probing(network, training=True):
        assert torch.is_grad_enabled()
        for name, module in network.named_modules():
            expected = name.startswith('backbone') and not isinstance(
                module, nn.BatchNorm2d
            )
            assert module.training == expected, name
    with torch.no_grad(), probing(network, training=True):
        assert torch.is_grad_enabled()


def test_warnings_of_a_probe_are_not_shown(network):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter('always')
        with probing(network):
            warnings.warn('of the network', stacklevel=1)
        assert shown == []
        warnings.warn('of training', stacklevel=1)
    assert [str(w.message) for w in shown] == ['of training']


def test_sample_images_are_always_the_same_ones(network):
    seed()
    expected = draw()
    seed()
    first = sample_images(network, SHAPE, 3)
    assert draw() == expected
    assert torch.equal(first, sample_images(network, SHAPE, 3))
    assert (tuple(first.shape), first.device.type) == ((3, *SHAPE), DEVICE)
