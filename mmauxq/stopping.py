"""SIGINT, SIGTERM and a launcher that is gone end a command in good order."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

LAUNCHER = 'MMAUXQ_LAUNCHER'
"""Environment variable: the process that started this rank."""
PATIENCE = 10
"""Seconds that an orphan has to end in good order."""
TWICE = 1.0
"""Seconds after which a second signal is one of its own: launchers and
terminals send the first one twice."""
AGAIN = 5.0
"""Seconds after which a signal whose exception was swallowed raises again."""
HINTS = {
    'train': 'go on with --resume',
    'export': 'the same command begins anew',
    'sensitivity': 'the same command begins anew',
    'compare': 'the same command goes on from here',
}
"""What helps after a command was stopped."""


class Stopped(BaseException):
    """SIGINT or SIGTERM asks this process to end.

    Not an ``Exception``, so that no handler of errors takes it for one.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f'stopped by {signal.Signals(number).name}')

    @property
    def status(self) -> int:
        """The exit status of the command."""
        return 128 + self.number

    def line(self, command: str) -> str:
        """What is said to the user, with what helps after ``command``."""
        hint = HINTS.get(command)
        return f'{self}; {hint}' if hint else str(self)


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """SIGINT and SIGTERM raise :class:`Stopped` in the main thread.

    A second signal ends the process at once. After the first, the processes of
    data loaders are ended as well. Does nothing in another thread.

    Yields:
        What raises :class:`Stopped` if a signal came before. Python and
        libraries turn the exception into others, so any error that is caught
        may come from a signal.
    """
    owner, report = os.getpid(), sys.unraisablehook
    first: tuple[int, float] | None = None

    def check() -> None:
        if first is not None:
            raise Stopped(first[0])

    if threading.current_thread() is not threading.main_thread():
        yield check
        return

    def stop(number: int, frame: object) -> None:
        nonlocal first
        if os.getpid() != owner:  # a loader process, which was forked
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return  # from a terminal, where the owner ends this one
        now = time.monotonic()
        if first is None:
            first = number, now
        elif number != signal.SIGALRM:
            if now - first[1] > TWICE:
                _end_now(number)
            return
        # loader processes that end, too, are no errors of their own
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        check()

    def unraisable(seen: 'sys.UnraisableHookArgs') -> None:
        if issubclass(seen.exc_type, Stopped):  # raised in a destructor
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        else:
            report(seen)

    kinds = signal.SIGINT, signal.SIGTERM, signal.SIGALRM
    before = [signal.signal(kind, stop) for kind in kinds]
    sys.unraisablehook = unraisable
    try:
        yield check
    except BaseException:
        if first is not None:
            end_children()  # here, where what they signal is no error
        check()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = report
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def end_children() -> None:
    """End the processes of data loaders, without a word of theirs."""
    import multiprocessing

    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(1)
        if child.is_alive():
            child.kill()


def end_with(parent: int) -> None:
    """End this process by SIGTERM as soon as its parent is gone.

    A thread looks once a second. If the process lives on for
    :data:`PATIENCE` seconds, such as in a collective operation whose other
    ranks are gone, it is killed.

    Args:
        parent: Process id, as ``os.getppid()`` tells it while it lives.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def end_quietly() -> None:
    """Let an interrupt that nobody catches end the program in one line.

    For Ctrl-C while the package is imported, before a command can say how it
    ends. Nothing changes in an interactive session.
    """
    report = sys.excepthook

    def hook(kind: Any, error: Any, trace: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt) or hasattr(sys, 'ps1'):
            report(kind, error, trace)
            return
        _end_now(signal.SIGINT)

    sys.excepthook = hook


def finish() -> None:
    """Let a signal end the process at once from now on: its work is done."""
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda number, _: _end_now(number))


def _end_now(number: int) -> NoReturn:
    if 'RANK' not in os.environ:  # else the launcher says it
        print(Stopped(number), file=sys.stderr, flush=True)
    os._exit(128 + number)
