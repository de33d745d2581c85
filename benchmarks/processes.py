"""Measurements in processes of their own, which share one GPU.

One that fails or is killed leaves the others alone. Rows are written as they
come.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import results
from .recipes import ROOT

TRACEBACK = 'Traceback (most recent call last):'
PATIENCE = 300
"""Seconds that one measurement may take."""


class Turn:
    """A lock that lets one process at a time work on the GPU.

    Args:
        path: The file that is locked; made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.file = path.open('w')

    def take(self) -> None:
        """Wait for the lock."""
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def give(self) -> None:
        """Let another process work."""
        fcntl.flock(self.file, fcntl.LOCK_UN)


def run_all(
    names: Sequence[str],
    out: Path,
    jobs: int,
    minutes: float | None,
    measure: Callable[[str, float], str],
) -> list[str]:
    """Run measurements; returns the names of those that failed.

    Args:
        names: What is measured, in this order.
        out: Folder of ``results.jsonl``.
        jobs: Measurements at a time. Their processes take turns on the GPU,
            and import, build and compile meanwhile.
        minutes: After so many none is started, and what runs is ended.
        measure: Called with a name and the seconds that it may take; writes
            the rows and returns a word about them. A RuntimeError says why
            there are none.
    """
    end = time.monotonic() + (minutes * 60 if minutes else float('inf'))
    out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    late: list[str] = []

    def run(name: str) -> None:
        start = time.monotonic()
        if start >= end:
            late.append(name)
            return
        try:
            outcome = measure(name, min(end - start, PATIENCE * jobs))
        except RuntimeError as error:
            outcome = 'FAILED'
            failed.append(name)
            results.append(out, dict(arm=name, error=str(error)))
        seconds = time.monotonic() - start
        print(f'{name}: {outcome} in {seconds:.0f} s', flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list((pool.map if jobs > 1 else map)(run, names))
        finally:  # also if the user interrupts
            pool.shutdown(cancel_futures=True)
    if late:
        print(f'out of time: {len(late)} not started', flush=True)
    return failed


def measure(name: str, patience: float, out: Path, **settings: Any) -> str:
    """Run :mod:`.measure` in a process, for :func:`run_all`."""
    log = out / 'logs' / f'{name.replace("/", "-")}.txt'
    log.parent.mkdir(exist_ok=True)
    arguments = json.dumps(dict(settings, name=name, out=str(out.resolve())))
    with log.open('w') as stream:
        try:
            status = subprocess.run(
                [sys.executable, '-m', 'benchmarks.measure', arguments],
                stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT,
                env={**os.environ, 'TORCHINDUCTOR_COMPILE_THREADS': '4'},
                timeout=patience,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f'took more than {patience:.0f} s') from error
    if status < 0:
        raise RuntimeError(f'ended by {signal.Signals(-status).name}')
    if status:
        raise RuntimeError(last_words(log, f'exit status {status}'))
    return 'done'


def last_words(log: Path, default: str) -> str:
    """Why a process failed: a line of what it printed.

    Args:
        log: Everything that it printed.
        default: For a process that printed nothing.
    """
    lines = [
        line
        for line in log.read_text().splitlines()
        # of a launcher; the lines of its ranks say why
        if line.strip() and not line.endswith('job was stopped')
    ]
    # a command of this package says why before its caller's traceback
    errors = [line for line in lines if line.startswith('error: ')]
    starts = [n for n, line in enumerate(lines) if line.startswith(TRACEBACK)]
    if starts and not errors:  # some exceptions have hints below their line
        below = lines[starts[-1] + 1 :]
        errors = [line for line in below if not line[0].isspace()][:1]
    return (errors or lines or [default])[-1][:400]
