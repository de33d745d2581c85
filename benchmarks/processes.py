"""Measurements in processes of their own, which share one GPU.

One that fails or is killed leaves the others alone. Rows are written as they
come.
"""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import results
from .recipes import ROOT

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

    @contextmanager
    def given(self) -> Iterator[None]:
        """Other processes may work meanwhile."""
        self.give()
        try:
            yield
        finally:
            self.take()


def run_all(
    names: Sequence[str], out: Path, jobs: int, minutes: float | None,
    repeats: int, batch: int | None, size: int,
) -> list[str]:  # fmt: skip
    """Run measurements; returns the names of those that failed.

    Args:
        names: As of :func:`.names.chosen`, without ``scaling/*``.
        out: Folder of ``results.jsonl``.
        jobs: Processes at a time. They take turns on the GPU, and import,
            build and compile meanwhile.
        minutes: After so many none is started, and what runs is ended.
        repeats: As of :func:`.measure.measure`, like ``batch`` and ``size``.
    """
    end = time.monotonic() + (minutes * 60 if minutes else float('inf'))
    options = ['--repeats', str(repeats), '--size', str(size)]
    if batch:
        options += ['--batch', str(batch)]
    out.mkdir(parents=True, exist_ok=True)
    waiting, failed = list(names), []
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    while waiting or running:
        late = time.monotonic() > end
        if late and waiting:
            print(f'out of time: {len(waiting)} not started', flush=True)
            waiting = []
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            running[name] = (_start(name, out, options), time.monotonic())
        for name, (process, start) in list(running.items()):
            seconds = time.monotonic() - start
            if process.poll() is None:
                if not late and seconds <= PATIENCE * jobs:
                    continue
                process.kill()
                process.wait()
            del running[name]
            if process.returncode:
                failed.append(name)
                row = dict(arm=name, error=last_words(_log(name, out)))
                results.append(out, row)
            print(
                f'{name}: {"FAILED" if process.returncode else "done"} '
                f'in {seconds:.0f} s',
                flush=True,
            )
        time.sleep(0.1)
    return failed


def _start(name: str, out: Path, options: Sequence[str]) -> subprocess.Popen:
    log = _log(name, out)
    log.parent.mkdir(exist_ok=True)
    with log.open('w') as stream:
        return subprocess.Popen(
            [sys.executable, '-m', 'benchmarks.measure', name,
             '--out', str(out.resolve()), *options],
            stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT,
            env={**os.environ, 'TORCHINDUCTOR_COMPILE_THREADS': '4'},
        )  # fmt: skip


def _log(name: str, out: Path) -> Path:
    return out / 'logs' / f'{name.replace("/", "-")}.txt'


def last_words(log: Path, default: str = 'killed') -> str:
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
    return (errors or lines or [default])[-1][:400]
