"""Runs that are killed, and what is left of them.

Training happens in forked processes, so that the parent pays once for the
imports. Nothing here is a test; see engine/test_resume.py and
stress/resume.py.
"""

import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from mmauxq import files
from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.engine import resumable_loops as loops
from tests.commands import train

# The first backward pass of a process decides whether autograd has threads; it
# has, and no forked process can compute gradients, if something was compiled
# or exported before. All test files are imported before the first test runs.
# With a GPU it would initialise that, which no forked process could use then.
if not torch.cuda.is_available():
    torch.ones((), requires_grad=True).backward()

VOLATILE = {'cfg', 'eta', 'experiment_name', 'mmengine_version'}
"""What a message hub holds that two equal runs may differ in."""


def die() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(step: int) -> Callable[[], None]:
    """Die before the training step of this number, from 0."""

    def prepare() -> None:
        for loop in (loops.EpochLoop, loops.IterLoop):
            before = loop.run_iter

            def run_iter(self, *args, before=before):
                if self._iter == step:
                    die()
                before(self, *args)

            loop.run_iter = run_iter

    return prepare


def in_validation(number: int) -> Callable[[], None]:
    """Die as the validation of this number, from 0, begins."""

    def prepare() -> None:
        before, seen = loops.ResumableLoop._validate, []

        def validate(self) -> None:
            seen.append(1)
            if len(seen) > number:
                die()
            before(self)

        loops.ResumableLoop._validate = validate

    return prepare


def in_write(number: int, stage: str) -> Callable[[], None]:
    """Die while the file of this number, from 0, is written.

    Args:
        number: Counts everything that is written: checkpoints, the best
            ones, the pointers.
        stage: ``'half'`` leaves half of the new file, ``'before rename'``
            all of it under its temporary name, ``'after rename'`` under its
            own.
    """

    class Os:
        """The module ``os`` as seen by mmauxq.files."""

        count = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def replace(self, source, target) -> None:
            due = Os.count == number
            Os.count += 1
            if due and stage == 'half':
                os.truncate(source, os.path.getsize(source) // 2)
            if due and stage != 'after rename':
                die()
            os.replace(source, target)
            if due:
                die()

    def prepare() -> None:
        files.os = Os()

    return prepare


def fork_train(
    words: list, log: Path, prepare: Callable[[], None] = lambda: None
) -> int:
    """Start ``tools/train.py WORDS`` in a forked process; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
        warnings.resetwarnings()  # pytest makes them errors
        prepare()
        status = train([str(word) for word in words])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_train(
    words: list,
    log: Path,
    prepare: Callable[[], None] = lambda: None,
    kill_after: float | None = None,
) -> int:
    """As :func:`fork_train`, to its end; returns the exit status.

    Args:
        words: Arguments of ``tools/train.py``.
        log: Where its output goes.
        prepare: Called in the process before training.
        kill_after: Seconds after which it is killed, if it still runs.
    """
    pid = fork_train(words, log, prepare)
    if kill_after is not None:
        end = time.monotonic() + kill_after
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_ranks(
    count: int,
    words: list,
    log: Path,
    prepare: Callable[[], None] = lambda: None,
) -> list[int]:
    """As :func:`run_train`, on some ranks; returns their exit statuses."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]

    def rank_of(rank: int) -> Callable[[], None]:
        def start() -> None:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
            )  # fmt: skip
            torch.set_num_threads(1)
            prepare()

        return start

    words = [*words, '--launcher', 'pytorch']
    ranks = [fork_train(words, log, rank_of(i)) for i in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(i, 0)[1]) for i in ranks]


def keep_line(results: TextIO, number: int, line: dict) -> None:
    """Show what came of a kill, and add it to a file of JSON lines."""
    print(number, line, flush=True)
    results.write(json.dumps(line) + '\n')
    results.flush()


def content(path: Path) -> dict[str, Any]:
    """What two checkpoints of equal runs share, flat: name -> value."""
    checkpoint = read_checkpoint(path)
    hub = checkpoint['message_hub']
    hub['log_scalars'] = {
        key: value
        for key, value in hub['log_scalars'].items()
        if not key.endswith('time')
    }
    hub['runtime_info'] = {
        key: os.path.basename(value) if key.endswith('_ckpt') else value
        for key, value in hub['runtime_info'].items()
        if key not in VOLATILE
    }
    meta = checkpoint['meta']
    checkpoint['meta'] = {k: meta[k] for k in ('epoch', 'iter', 'seed')}
    flat: dict[str, Any] = {}
    _flatten('', checkpoint, flat)
    return flat


def _flatten(prefix: str, value: Any, flat: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(f'{prefix}/{key}', inner, flat)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _flatten(f'{prefix}/{index}', inner, flat)
    else:
        flat[prefix] = value


def differences(path: Path, other: Path) -> list[str]:
    """Names of what differs in a bit between two checkpoints."""
    first, second = content(path), content(other)
    assert len(first) > 100
    found = sorted(first.keys() ^ second.keys())
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        if isinstance(a, torch.Tensor):
            same = a.dtype == b.dtype and torch.equal(a, b)
        elif hasattr(a, 'tolist'):
            same = a.tolist() == b.tolist()
        else:
            same = a == b
        if not same:
            found.append(name)
    return found
