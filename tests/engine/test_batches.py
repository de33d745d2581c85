"""Batches, and the next one ahead of its time."""

import pytest
import torch

from mmauxq.engine import loops
from mmauxq.engine.batches import END, Batches
from tests.running import make_runner


def numbered(count, log):
    for i in range(count):
        log.append(i)
        yield dict(inputs=[torch.full((2,), i), torch.zeros(1)], other=i)


@pytest.mark.parametrize('device', [None, torch.device('cpu')])
def test_in_order_and_once_each(device):
    log = []
    batches = Batches(numbered(3, log), device)
    assert log == []
    batches.fetch()
    batches.fetch()
    assert log == [0]
    for i in range(3):
        batch = batches.take()
        assert batch['other'] == i and batch['inputs'][0].tolist() == [i, i]
        batches.fetch()
        assert log == list(range(min(i + 2, 3)))
    assert batches.take() is END and batches.take() is END


def test_a_batch_that_is_no_dict_is_left_alone():
    batch = (torch.zeros(2), 'label')
    assert Batches(iter([batch]), torch.device('cpu')).take() is batch


@pytest.mark.parametrize(
    'train_cfg',
    [
        dict(type='mmauxq.EpochLoop', max_epochs=2),
        dict(type='mmauxq.IterLoop', max_iters=8),
    ],
)
@pytest.mark.parametrize('workers', [0, 2])
def test_training_is_the_same_ahead_of_time(
    tmp_path, monkeypatch, train_cfg, workers
):
    """On a CPU nothing is fetched ahead; here it is made to."""
    results, fetched = [], []
    fetch = Batches.fetch
    for ahead in (False, True):
        if ahead:
            monkeypatch.setattr(
                loops, 'device_of', lambda model: torch.device('cpu')
            )
            monkeypatch.setattr(
                Batches,
                'fetch',
                lambda self: (fetched.append(self._next is None), fetch(self)),
            )
        runner = make_runner(
            tmp_path / f'{ahead}',
            train_cfg=train_cfg,
            workers=workers,
        )
        runner.train()
        results.append(runner.model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
    # one that comes too early for each that is asked for in its time
    assert fetched.count(False) in ((7, 8) if workers else (0,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA GPU')
def test_images_are_on_the_gpu():
    device = torch.device('cuda', 0)
    images = [torch.full((64, 3, 64, 64), i).pin_memory() for i in range(4)]
    batches = Batches(iter([dict(inputs=x) for x in images]), device)
    for expected in images:
        batches.fetch()
        found = batches.take()['inputs']
        assert found.device == device
        assert torch.equal(found.cpu(), expected)
