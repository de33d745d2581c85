"""An epoch of the command, and one of a plain loop."""

import pytest
import torch

from benchmarks import epoch
from benchmarks.processes import Turn
from benchmarks.report import markdown


@pytest.mark.slow
def test_both_train_and_are_timed(tmp_path, monkeypatch):
    accuracies = []
    plain = epoch.PlainLoop.epoch

    def noted(self, clock):
        accuracies.append(plain(self, clock))

    monkeypatch.setattr(epoch.PlainLoop, 'epoch', noted)
    turn = Turn(tmp_path / 'lock')
    with turn.file:
        row = epoch.measure('r8', 2, tmp_path, turn)
    assert len(epoch.BesidePlainLoop.records) == len(accuracies) == 4
    assert accuracies[-1] > 0.3  # it learns; guessing gives 0.1
    assert row['repeats'] == 2
    assert 0 < row['loader_s'] < row['plain_s']
    assert 0 < row['added_us'] * 19 / 1e6 < row['runner_s']
    assert row['ratio_low'] <= row['ratio'] <= row['ratio_high']
    assert torch.load(tmp_path / 'plain.pth').keys() == {
        'network', 'optimizer'
    }  # fmt: skip
    more = dict(arm='epoch/r8', network='r8', device='CPU', torch='2')
    text = markdown([{**row, **more}])
    assert f'| r8 | {row["runner_s"]:.2f} |' in text


def test_medians_and_spread():
    records = [
        dict(runner_s=float(n), ratio=n / 10, added_us=100.0 * n)
        for n in (3, 1, 2, 5, 4)
    ]
    row = epoch._summary(records)
    assert row['runner_s'] == 3 and 'runner_s_low' not in row
    assert (row['ratio_low'], row['ratio'], row['ratio_high']) == (
        0.1, 0.3, 0.5
    )  # fmt: skip
    assert (row['added_us_low'], row['added_us_high']) == (100, 500)


def test_a_clocked_loader_gives_the_batches_and_their_time():
    clock = epoch.Clock()
    loader = epoch.ClockedLoader([1, 2, 3], clock)
    assert list(loader) == [1, 2, 3] == list(loader)
    assert len(loader) == 3 and clock.total > 0
    assert loader.count(2) == 1  # all else is the loader's
