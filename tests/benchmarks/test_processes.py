import pytest

from benchmarks import processes, results
from benchmarks.processes import PATIENCE, TRACEBACK, last_words, run_all


@pytest.mark.parametrize(
    'text, words',
    [
        ('', 'nothing'),
        ('a\nb\n\n', 'b'),
        ('why\nerror: rank 1 died; the job was stopped\n', 'why'),
        ('error: why\nTraceback\nRuntimeError: 2\n', 'error: why'),
        (f'{TRACEBACK}\n  a\nE: b\n\n{TRACEBACK}\n  c\nwhy\n\nhint\n', 'why'),
        ('x' * 500, 'x' * 400),
    ],
)
def test_last_words(tmp_path, text, words):
    log = tmp_path / 'log'
    log.write_text(text)
    assert last_words(log, 'nothing') == words


@pytest.mark.parametrize('jobs', [1, 2])
def test_one_that_fails_does_not_stop_the_others(tmp_path, jobs, capsys):
    def measure(name, patience):
        assert patience == PATIENCE * jobs
        if name == 'bad':
            raise RuntimeError('why')
        return 'fine'

    out = tmp_path / 'new'
    assert run_all(['bad', 'good'], out, jobs, None, measure) == ['bad']
    assert results.read(out) == [dict(arm='bad', error='why')]
    lines = sorted(capsys.readouterr().out.splitlines())
    assert [line.rpartition(' in ')[0] for line in lines] == [
        'bad: FAILED',
        'good: fine',
    ]


def test_nothing_starts_when_time_is_up(tmp_path, capsys):
    def measure(name, patience):
        assert 0 < patience <= 60
        return 'fine'

    assert run_all(['a'], tmp_path, 1, 1, measure) == []
    assert run_all(['a', 'b'], tmp_path, 1, -1, measure) == []
    assert capsys.readouterr().out.endswith('out of time: 2 not started\n')
    assert results.read(tmp_path) == []


def test_one_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(RuntimeError, match='took more than 0 s'):
        processes.measure('ops/activations', 0.1, tmp_path, repeats=1)


def test_one_that_is_killed_says_so(tmp_path, monkeypatch):
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho a warning\nkill -TERM $$\n')
    python.chmod(0o755)
    monkeypatch.setattr(processes.sys, 'executable', str(python))
    with pytest.raises(RuntimeError, match='^ended by SIGTERM$'):
        processes.measure('ops/activations', 9, tmp_path)
