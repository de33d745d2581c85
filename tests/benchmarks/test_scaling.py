"""Several GPUs: names and, on the CPU, that it runs."""

import json
import signal
import sys

import pytest
import torch

from benchmarks import results, scaling
from mmauxq.errors import UsageError

ARM = 'scaling/r20/w4a4/plain/2'


@pytest.mark.parametrize(
    'count, expected',
    [(0, [1, 2]), (1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])],
)
def test_numbers_of_gpus(monkeypatch, count, expected):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    assert scaling.gpus_here() == expected


def test_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert scaling.names([ARM], [1, 4]) == [f'{ARM}/1', f'{ARM}/4']
    assert scaling.names([], [4]) == []
    with pytest.raises(UsageError, match='expected 1 to 4, .*, got 8'):
        scaling.names([ARM], [8])


def test_the_last_words_of_a_run_that_fails(tmp_path):
    script = (
        'print("why")\n'
        'print("error: rank 1 died; the job was stopped")\n'
        'raise SystemExit(3)\n'
    )
    command, log = [sys.executable, '-c', script], tmp_path / 'log'
    assert scaling._run(command, log, 30) == 'why'
    assert scaling._run([sys.executable, '-c', ''], log, 30) is None
    command[2] = 'raise SystemExit(3)'
    assert scaling._run(command, log, 30) == 'exit status 3'


def test_a_run_that_hangs_is_ended(tmp_path):
    script = (
        'import signal, sys, time\n'
        'signal.signal(signal.SIGTERM, lambda *a: sys.exit(print("bye")))\n'
        'signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})\n'
        'time.sleep(100)\n'
    )
    log = tmp_path / 'log'
    command = [sys.executable, '-uc', script]
    # it inherits that the signal is held back until it is ready for it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        assert scaling._run(command, log, 1.5) == 'took more than 2 s'
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert log.read_text() == 'bye\n'


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='for gloo')
def test_two_processes(tmp_path, monkeypatch):
    """With a profile, which says nothing where there is no GPU."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    said = scaling.measure(
        f'{ARM}/2', 300, tmp_path, steps=3, batch=None, size=32, profile=1
    )
    (found,) = results.read(tmp_path)
    assert (found['arm'], found['gpus'], found['batch']) == (f'{ARM}/2', 2, 2)
    assert said == f'{found["images_per_s"]} images/s'
    # rounded to a tenth, which is much where a step takes a second
    assert found['images_per_s'] == pytest.approx(4e3 / found['ms'], abs=0.06)
    assert found['repeats'] == 3 and found['data_ms'] > 0
    assert 0 < found['launch_s'] < found['seconds']
    assert 0 < found['end_s'] < found['seconds'] - found['launch_s']
    assert found['wrapper'] == 'RecordedDDP'
    assert found['split'] is None and found['peak_gib'] is None
    assert results.done(tmp_path) == {f'{ARM}/2'}
    folder = tmp_path / f'{ARM}/2'.replace('/', '-')
    ranks = [
        json.loads((folder / f'rank{r}.json').read_text()) for r in (0, 1)
    ]
    assert all(len(rank['time']) == 3 for rank in ranks)
    assert not list(folder.glob('*.pth'))
