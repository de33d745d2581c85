"""What is said of a long job, with a clock that the test moves."""

import io

import pytest

from tools import quickstart_progress as module
from tools.quickstart_progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])
    return now


def test_the_pace_takes_the_place_of_the_expectation(clock):
    progress = Progress(30.0, io.StringIO())
    progress.begin('load', 10.0)
    clock[0] = 5.0
    assert progress.line() == '[5 s, 17% done, about 25 s left] load'
    # what nobody counts does not change the pace, however long it takes
    clock[0] = 100.0
    assert progress.line() == '[100 s, 32% done, about 20 s left] load'
    progress.begin('train', 20.0, counted=True)
    assert progress.line() == '[100 s, 33% done, about 20 s left] train (0%)'
    clock[0] = 130.0  # three times as slow as expected
    progress.step(1, 2)
    assert progress.line() == '[130 s, 67% done, about 20 s left] train (50%)'
    clock[0] = 160.0
    progress.begin('end', 0.0, counted=True)
    assert progress.line() == '[160 s, 100% done, about 0 s left] end (0%)'


def test_elsewhere_than_on_a_terminal_lines_stay(clock):
    stream = io.StringIO()
    progress = Progress(10.0, stream)
    progress.begin('a', 5.0)
    progress.log('b')
    assert stream.getvalue() == '[0 s, 0% done, about 10 s left] a\nb\n'


def test_on_a_terminal_the_line_is_written_over(clock):
    stream = Terminal()
    progress = Progress(10.0, stream)
    progress.begin('a', 5.0)
    assert '\n' not in stream.getvalue()
    progress.log('b')
    assert stream.getvalue().endswith('\r\033[2Kb\n')


def test_it_speaks_by_itself(monkeypatch):
    monkeypatch.setattr(module, 'SILENCE', 0.0)
    spoken = module.threading.Event()

    class Stream(io.StringIO):
        def write(self, text):
            spoken.set()
            return super().write(text)

    stream = Stream()
    with Progress(10.0, stream):
        assert spoken.wait(600)
    assert 'starting' in stream.getvalue()
