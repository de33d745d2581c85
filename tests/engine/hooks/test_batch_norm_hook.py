import copy

import pytest
import torch
from mmengine.hooks import Hook
from torch import nn

from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.engine.hooks import reestimate_batch_norm
from mmauxq.errors import UsageError
from mmauxq.registry import HOOKS
from tests.networks import batch, joint_qat
from tests.running import Samples, make_runner, with_validation
from tests.support.ranks import on_ranks


@pytest.fixture
def network():
    model = joint_qat(guidance=None)
    model.loss(*batch())
    return model


def first_norm(model):
    return next(
        m
        for m in model.architecture.backbone.modules()
        if isinstance(m, nn.BatchNorm2d)
    )


def batches():
    return [batch(seed=s)[0] for s in range(3)]


def test_statistics_are_the_average_over_the_batches(network):
    network.train()
    architecture = network.architecture
    norm = first_norm(network)
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
    norm = first_norm(network)
    before = norm.running_mean.clone()
    with pytest.raises(UsageError, match='at least one batch, got none'):
        reestimate_batch_norm(network.architecture, [])
    assert torch.equal(norm.running_mean, before)


class Images(nn.Module):
    """A batch norm of its images."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x, mode):
        return self.norm(x)


def rank_images(rank):
    return torch.randn(64, 2, 5, 5, generator=torch.manual_seed(rank)) + rank


def estimate_on_a_rank(rank):
    net = Images()
    reestimate_batch_norm(net, [rank_images(rank)])
    return net.norm.running_mean.tolist(), net.norm.running_var.tolist()


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_ranks_are_pooled_as_one_batch():
    """Their means are one apart, which is a quarter of variance."""
    first, second = on_ranks(2, estimate_on_a_rank)
    assert first == second
    images = torch.cat([rank_images(rank) for rank in range(2)])
    mean, variance = map(torch.tensor, first)
    torch.testing.assert_close(mean, images.mean((0, 2, 3)))
    # each rank divides by one less than its number of images
    torch.testing.assert_close(
        variance, images.var((0, 2, 3)), rtol=1e-3, atol=0
    )


HOOK = dict(type='mmauxq.BatchNormHook', batches=2)


class Watch(Hook):
    """Keeps the statistics that are validated; may stop the run."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.validated: list[torch.Tensor] = []

    def before_val_epoch(self, runner) -> None:
        self.validated.append(first_norm(runner.model).running_mean.clone())

    def after_val_epoch(self, runner, metrics=None) -> None:
        if runner.iter == self.stop_at:
            runner.train_loop.stop_training = True


def reestimated(model):
    """The mean of the first norm over the first 8 training images."""
    again = copy.deepcopy(model)
    reestimate_batch_norm(again.architecture, Samples().images[:8].split(4))
    return first_norm(again).running_mean


EPOCHS = dict(type='mmauxq.EpochLoop', max_epochs=3)
STEPS = dict(type='mmauxq.IterLoop', max_iters=12, val_interval=4)


@pytest.mark.parametrize('stop_at', [None, 8])
@pytest.mark.parametrize(
    'loop, by_epoch', [(EPOCHS, True), (EPOCHS, False), (STEPS, False)]
)
def test_what_is_saved_and_validated_last_is_reestimated(
    tmp_path, loop, by_epoch, stop_at
):
    watch = Watch(stop_at)
    runner = make_runner(
        tmp_path,
        train_cfg=dict(loop),
        custom_hooks=[HOOK],
        default_hooks=dict(
            checkpoint=dict(
                type='mmauxq.SafeCheckpointHook',
                interval=1 if by_epoch else 4,
                by_epoch=by_epoch,
            )
        ),
        **with_validation(),
    )
    runner.register_hook(watch)
    runner.train()
    expected = reestimated(runner.model)
    assert runner.iter == (stop_at or 12)
    torch.testing.assert_close(watch.validated[-1], expected)
    # those before, also the one after which the run was stopped, are not
    assert len(watch.validated) == 3
    assert not torch.allclose(watch.validated[-2], expected, rtol=1e-2)
    last = read_checkpoint((tmp_path / 'last_checkpoint').read_text())
    (name,) = [n for n, m in runner.model.named_modules()
               if m is first_norm(runner.model)]  # fmt: skip
    saved = last['state_dict'][f'{name}.running_mean']
    torch.testing.assert_close(saved, expected)
    assert last['meta']['iter'] == runner.iter


@pytest.mark.parametrize('batches', [0, -1, 'all'])
def test_batches(batches):
    with pytest.raises(UsageError, match='expected an integer from 1, got'):
        HOOKS.build(dict(type='mmauxq.BatchNormHook', batches=batches))
