"""Where loops begin, how long they remember."""

import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader

from mmauxq.engine import resumable_loops as loops
from mmauxq.engine.running import seed_step
from mmauxq.errors import UsageError
from tests.networks import joint_qat
from tests.running import Samples, make_runner


@pytest.mark.parametrize('kind', [DefaultSampler, InfiniteSampler])
@pytest.mark.parametrize('workers', [0, 1])
def test_a_loader_that_starts_later_gives_the_rest(kind, workers):
    def loader():
        data = torch.arange(20)
        return DataLoader(
            data, 3, sampler=kind(data, seed=4), num_workers=workers
        )

    whole = loader()
    batches = loops.starting_at(whole, 0)
    expected = [next(batches).tolist() for _ in range(6)]
    late = loader()
    batches = loops.starting_at(late, 4)
    assert [next(batches).tolist() for _ in range(2)] == expected[4:]
    assert isinstance(late.batch_sampler.sampler, kind)
    assert len(late) == 7


def test_a_loader_with_batches_of_its_own():
    class Mine(BatchSampler):
        pass

    data = torch.arange(8)
    loader = DataLoader(data, batch_sampler=Mine(range(8), 2, False))
    assert [b.tolist() for b in loops.starting_at(loader, 3)] == [[6, 7]]


def test_numbers_of_a_step_depend_on_the_step_alone():
    def draw(*key):
        seed_step(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(1, 2) == draw(1, 2)
    others = [draw(1, 3), draw(2, 2), draw(1, 2, 'val'), draw(12, 2)]
    assert all(
        a != b for o in others for a, b in zip(draw(1, 2), o, strict=True)
    )


@pytest.mark.parametrize(
    'train_cfg',
    [
        dict(type='mmauxq.EpochLoop', max_epochs=3),
        dict(type='mmauxq.IterLoop', max_iters=12),
    ],
)
def test_the_log_does_not_grow_for_ever(tmp_path, monkeypatch, train_cfg):
    monkeypatch.setattr(loops, 'LEAST_HISTORY', 5)
    runner = make_runner(tmp_path, train_cfg=train_cfg)
    hub = runner.message_hub
    hub.update_scalar('train/loss', 1.0)
    hub.update_scalar('val/x', 1.0)
    runner.train()
    assert runner.iter == 12
    assert len(hub.get_scalar('train/loss').data[0]) == 5
    assert hub.get_scalar('val/x').max_length > 5


@pytest.mark.parametrize(
    'train_cfg',
    [
        dict(type='mmauxq.EpochLoop', max_epochs=1),
        dict(type='mmauxq.IterLoop', max_iters=2),
    ],
)
def test_a_last_batch_that_batch_norm_cannot_use(tmp_path, train_cfg):
    data = Samples(5)  # the second batch has one image
    data.images = data.images[..., :2, :2]  # a map of 1 x 1 at the end
    model = joint_qat(input_shape=(1, 2, 2))
    runner = make_runner(tmp_path, data, model, train_cfg=train_cfg)
    with pytest.raises(UsageError) as raised:
        runner.train()
    message = str(raised.value)
    assert message == (
        'train_dataloader: step 1: expected 2 or more values per channel, '
        'got input size torch.Size([1, 8, 1, 1]); set drop_last=True or '
        'another batch_size'
    )
    assert '\n' not in message


def test_other_errors_of_a_step_stay_as_they_are(tmp_path, monkeypatch):
    model = joint_qat()
    monkeypatch.setattr(model, 'loss', lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_runner(tmp_path, model=model).train()
