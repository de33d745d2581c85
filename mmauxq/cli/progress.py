"""How far a long job is, for people and for logs."""

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

SILENCE = 5.0
"""Most seconds between two lines."""


class Progress:
    """Says what runs, how far the job is and how long it still takes.

    A thread of its own speaks, so that a line comes also while something
    slow is imported. On a terminal the line is written over, elsewhere each
    is kept.

    Args:
        seconds: Expected for the whole job. As the job gets on, what it
            really takes replaces the expectation.
        stream: To write to; by default standard output, as it is now.
    """

    def __init__(self, seconds: float, stream: TextIO | None = None) -> None:
        self.total = seconds
        self.stream = sys.stdout if stream is None else stream
        self._over = self.stream.isatty()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._speak, daemon=True)
        self.start = self._began = time.monotonic()
        self._done = self._expected = 0.0
        self._part: float | None = None
        self.what = 'starting'

    def __enter__(self) -> 'Progress':
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._write('' if self._over else None)

    def begin(self, what: str, seconds: float) -> None:
        """The next part of the job begins, the one before it is done.

        Args:
            what: Shown in each line.
            seconds: Expected for it.
        """
        self._done += self._expected
        self.what, self._expected, self._part = what, seconds, None
        self._began = time.monotonic()
        self._write(self.line())

    def step(self, done: int, of: int) -> None:
        """How far the part is that runs now."""
        self._part = done / of

    def say(self, text: str) -> None:
        """Print a text that stays."""
        self._write(text, stays=True)

    def line(self) -> str:
        """What is shown: elapsed, part of the job, time left, what runs."""
        now = time.monotonic()
        part = self._part
        if part is None:  # nobody counts its steps
            part = min((now - self._began) / (self._expected or 1), 0.95)
        done = min(self._done + part * self._expected, self.total)
        elapsed = now - self.start
        # the expectation counts as much as the first ten seconds
        left = (self.total - done) * (elapsed + 10) / (done + 10)
        steps = '' if self._part is None else f' ({part:.0%})'
        return (
            f'[{elapsed:3.0f} s, {done / self.total:3.0%} done, '
            f'about {left:.0f} s left] {self.what}{steps}'
        )

    def _speak(self) -> None:
        while not self._stop.wait(0.5 if self._over else SILENCE):
            self._write(self.line())

    def _write(self, text: str | None, stays: bool = False) -> None:
        if text is None:
            return
        with self._lock:
            if self._over:
                text = f'\r\033[2K{text}'
            self.stream.write(text + ('\n' if stays or not self._over else ''))
            self.stream.flush()
