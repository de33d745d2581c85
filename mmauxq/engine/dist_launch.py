"""Start one process per GPU, or on the CPU, and report how they ended.

Called by ``tools/dist_train.sh`` and ``tools/dist_test.sh``. A wrapper of
torchrun that checks GPUS first, and replaces torchrun's report on failure (a
traceback) by one line and the exit status of the rank that failed.
"""

import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmauxq.errors import UsageError
from mmauxq.stopping import LAUNCHER, Stopped, finish, stoppable

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

TOGETHER = 20
"""Seconds in which ranks end by themselves; torchrun sends SIGKILL later."""


def main(argv: list[str] | None = None) -> int:
    """Run ``GPUS SCRIPT [ARGS]``; returns the exit status."""
    gpus, *script = sys.argv[1:] if argv is None else argv
    try:
        with stoppable():
            return _run(check_gpus(gpus), script)
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped.line(Path(script[0]).stem), file=sys.stderr)
        return stopped.status


def check_gpus(gpus: str) -> int:
    """The argument GPUS as a number; a UsageError if it is none that this
    machine can start."""
    import torch

    if not gpus.isdecimal() or int(gpus) < 1:
        raise UsageError(f'GPUS must be a positive integer, not {gpus!r}')
    present = torch.cuda.device_count()
    if present and int(gpus) > present:
        raise UsageError(f'GPUS is {gpus}, but this machine has {present}')
    return int(gpus)


def _run(processes: int, script: list[str]) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import (
        SignalException,
        errors,
    )

    os.environ[LAUNCHER] = str(os.getpid())
    # torchrun and MMEngine would set them too, with a warning
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        os.environ.setdefault(name, '1')
    for name in list(logging.root.manager.loggerDict):
        if name.startswith('torch.distributed.elastic'):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    args = run.get_args_parser().parse_args(
        [
            f'--nnodes={os.environ.get("NNODES", 1)}',
            f'--node-rank={os.environ.get("NODE_RANK", 0)}',
            f'--master-addr={os.environ.get("MASTER_ADDR", "127.0.0.1")}',
            f'--master-port={os.environ.get("PORT") or _free_port()}',
            f'--nproc-per-node={processes}',
            *script,
        ]
    )
    try:
        run.run(args)
    except SignalException as error:
        raise Stopped(error.sigval) from error
    except errors.ChildFailedError as error:
        if any(f.exitcode == 2 for f in error.failures.values()):
            return 2  # that rank has printed why
        rank, status = _cause(error.failures)
        how = f'ended with exit status {status}'
        if status < 0:
            how = f'was killed by signal {-status}'
        message = f'error: rank {rank} {how}; the job was stopped'
        print(message, file=sys.stderr)
        return status if status > 0 else 1
    return 0


def _cause(failures: 'Mapping[int, ProcessFailure]') -> tuple[int, int]:
    """Which of several dead ranks died first, and its exit status.

    A killed rank did; the others end when they miss it, or the launcher ends
    them: by SIGTERM, and long afterwards by SIGKILL those that wait on a GPU
    for the dead one.

    Args:
        failures: Rank -> how it ended, as torchrun saw it.
    """
    ended = -signal.SIGTERM, 128 + signal.SIGTERM
    begin = min(failure.timestamp for failure in failures.values())
    statuses = [
        (rank, failure.exitcode)
        for rank, failure in failures.items()
        if failure.timestamp < begin + TOGETHER
    ]
    return min(statuses, key=lambda i: (i[1] in ended, i[1] >= 0, i[0]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


if __name__ == '__main__':
    status = main()
    finish()
    sys.exit(status)
