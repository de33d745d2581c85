"""How far a long job is, for people and for logs."""

import sys
import threading
import time
from typing import TextIO

SILENCE = 5.0
"""Seconds after which a line is repeated where lines are kept."""


class Progress:
    """Prints what runs, how far the job is and how long it still takes.

    A thread prints, also during a slow import. On a terminal the line is
    written over, elsewhere each is kept.

    Args:
        seconds: Expected for the whole job. As the job gets on, the pace of
            what was counted takes the place of the expectation.
        stream: To write to; by default standard output, as it is now.
    """

    def __init__(self, seconds: float, stream: TextIO | None = None) -> None:
        self.total = seconds
        self.stream = sys.stdout if stream is None else stream
        self._over = self.stream.isatty()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)
        self._start = self._began = self._written = time.monotonic()
        # Seconds of counted work, taken and expected; it begins as if ten had
        # been as expected.
        self._pace = 10.0, 10.0
        self._done, self._expected = 0.0, 0.0
        self._part: float | None = 0.0
        self.what = 'starting'

    def __enter__(self) -> 'Progress':
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._over:
            self._write('')

    def begin(self, what: str, seconds: float, counted: bool = False) -> None:
        """The next part of the job begins, the one before it is done.

        Args:
            what: Shown in each line.
            seconds: Expected for it.
            counted: Whether :meth:`step` will say how far it is.
        """
        now = time.monotonic()
        if self._part is not None:
            self._pace = self._pace_after(now - self._began, self._expected)
        self._done += self._expected
        self.what, self._expected, self._began = what, seconds, now
        self._part = 0.0 if counted else None
        self._write(self.line())

    def step(self, done: int, of: int) -> None:
        """How far the part is that runs now."""
        self._part = done / of

    def log(self, text: str) -> None:
        """Print a text that stays."""
        self._write(text, stays=True)

    def line(self) -> str:
        """What is shown now."""
        now = time.monotonic()
        running, part = now - self._began, self._part
        taken, expected = self._pace
        steps = ''
        if part is None:
            part = min(running / self._expected, 0.95)
        else:
            taken, expected = self._pace_after(running, part * self._expected)
            steps = f' ({part:.0%})'
        done = self._done + part * self._expected
        left = (self.total - done) * taken / expected
        return (
            f'[{now - self._start:.0f} s, {done / self.total:.0%} done, '
            f'about {left:.0f} s left] {self.what}{steps}'
        )

    def _pace_after(self, taken: float, expected: float) -> tuple:
        return self._pace[0] + taken, self._pace[1] + expected

    def _repeat(self) -> None:
        while not self._stop.wait(0.5):
            if self._over or time.monotonic() - self._written > SILENCE:
                self._write(self.line())

    def _write(self, text: str, stays: bool = False) -> None:
        with self._lock:
            self._written = time.monotonic()
            if self._over:
                text = f'\r\033[2K{text}'
            self.stream.write(text + '\n' * (stays or not self._over))
            self.stream.flush()
