"""Helpers of hooks, loops and commands."""

import multiprocessing

import pytest

from mmauxq.engine.running import end_loaders
from tests.running import Samples, make_runner


@pytest.mark.parametrize('workers', [0, 2])
def test_loader_processes_end(tmp_path, workers):
    """They persist, as those of the recipes, and the loader lives on."""
    loader = dict(
        batch_size=4,
        num_workers=workers,
        persistent_workers=workers > 0,
        dataset=Samples(),
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    before = set(multiprocessing.active_children())
    runner = make_runner(tmp_path, train_dataloader=loader)
    runner.train()
    left = set(multiprocessing.active_children()) - before
    assert len(left) == workers
    end_loaders(runner)
    assert all(process.exitcode == 0 for process in left)
    assert len(list(runner.train_dataloader)) == 4
    end_loaders(runner)
    assert set(multiprocessing.active_children()) <= before
