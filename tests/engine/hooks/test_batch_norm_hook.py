from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmauxq.engine.hooks import reestimate_batch_norm
from mmauxq.errors import UsageError
from mmauxq.registry import HOOKS
from tests.networks import batch, joint_qat


@pytest.fixture
def network():
    model = joint_qat(guidance=None)
    model.loss(*batch())
    return model


def first_norm(model):
    return next(
        (name, m)
        for name, m in model.architecture.backbone.named_modules()
        if isinstance(m, nn.BatchNorm2d)
    )


def batches():
    return [batch(seed=s)[0] for s in range(3)]


def test_statistics_are_the_average_over_the_batches(network):
    network.train()
    architecture = network.architecture
    norm = first_norm(network)[1]
    before = {k: v.clone() for k, v in architecture.state_dict().items()}
    momentum = norm.momentum
    assert reestimate_batch_norm(architecture, batches()) == 3
    outputs = [architecture.backbone.conv1(x) for x in batches()]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    changed = {
        key.rpartition('.')[2]
        for key, value in architecture.state_dict().items()
        if not torch.equal(value, before[key])
    }
    assert changed == {'running_mean', 'running_var', 'num_batches_tracked'}
    assert norm.momentum == momentum
    assert all(m.training for m in architecture.modules())


def test_without_a_batch_nothing_changes(network):
    norm = first_norm(network)[1]
    before = norm.running_mean.clone()
    with pytest.raises(UsageError, match='there is no batch'):
        reestimate_batch_norm(network.architecture, [])
    assert torch.equal(norm.running_mean, before)


def runner_of(model, epoch):
    data = [dict(inputs=x) for x in batches()]
    preprocess = lambda data, training: data  # noqa: E731
    model.data_preprocessor = preprocess
    return SimpleNamespace(
        epoch=epoch, max_epochs=2, model=model, train_dataloader=data
    )


def test_the_hook_runs_after_the_last_epoch(network, monkeypatch):
    norm = first_norm(network)[1]
    monkeypatch.delitem(network._modules, 'data_preprocessor')
    hook = HOOKS.build(dict(type='mmauxq.BatchNormHook', batches=2))
    before = norm.running_mean.clone()
    hook.after_train_epoch(runner_of(network, 0))
    assert torch.equal(norm.running_mean, before)
    hook.after_train_epoch(runner_of(network, 1))
    outputs = [network.architecture.backbone.conv1(x) for x in batches()[:2]]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)


@pytest.mark.parametrize('batches', [0, -1, 'all'])
def test_batches(batches):
    with pytest.raises(UsageError, match='allowed are integers from 1'):
        HOOKS.build(dict(type='mmauxq.BatchNormHook', batches=batches))
