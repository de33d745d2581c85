"""How a command runs, and how it ends.

A command has two phases. Everything up to the first iteration - reading the
config, checking the inputs, building the runner, loading a checkpoint - is
the set-up: the user can mend what goes wrong there, so it ends as one line on
stderr and exit status 2 (``--debug`` shows the traceback). From the first
iteration on, errors keep their traceback and exit with 1, except
:class:`~mmauxq.errors.UsageError`. A :class:`~mmauxq.errors.TrainingError` is
one line and exit status 1, whenever it happens.
"""

import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn, TextIO

from mmauxq import compat
from mmauxq.errors import TrainingError, UsageError, one_line
from mmauxq.ranks import rank

from .parser import Parser

if TYPE_CHECKING:
    from mmengine.config import Config

# What a wrong config raises in the builders of MMEngine and of torch.
EXPECTED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
RANK_PATIENCE = 10
"""Seconds after which other ranks report an error that rank 0 has not."""


def run_command(
    command: ModuleType,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> int:
    """Run a command under the error policy of this file.

    Args:
        command: A module of :mod:`mmauxq.cli`. Its ``run`` may return an
            exit status; ``None`` is 0. With ``QUIET_SETUP``, the output of
            the set-up is shown when the set-up is over.
        argv: Arguments; by default those of the process.
        prog: The name of the command in its help.

    Returns:
        The exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog=prog, description=command.__doc__)
    command.add_arguments(parser)
    parser.add_argument(
        '--debug', action='store_true', help='show tracebacks of all errors'
    )
    compat.silence_neighbours()
    debug = '--debug' in argv
    held = HeldOutput(sys.stdout)
    running = False

    def mark_running() -> None:
        nonlocal running
        running = True
        held.release()

    args = None
    status = 0
    try:
        args = parser.parse_args(argv)
        os.environ.setdefault(
            'LOCAL_RANK', str(getattr(args, 'local_rank', 0))
        )
        if getattr(command, 'QUIET_SETUP', False) and not debug:
            sys.stdout = held  # type: ignore[assignment]
        status = command.run(args, mark_running) or 0
    except Exception as raised:
        error = _named(raised)
        mendable = isinstance(error, UsageError) or (
            not running and _is_expected(error)
        )
        known = mendable or isinstance(error, TrainingError)
        if known:
            held.drop()  # MMEngine's output would hide the line
        else:
            held.release()
        if debug or not known:
            traceback.print_exc()
        if known:
            _print_error(_with_place(error, getattr(args, 'loaded', None)))
        status = 2 if mendable else 1
    finally:
        held.release()
        if sys.stdout is held:
            sys.stdout = held.stream
        _leave_process_group()
    return status


class HeldOutput:
    """A text stream that keeps what is written until it is released.

    MMEngine prints some 170 lines before the first iteration. An error of the
    set-up is then one line on an empty screen; the log file in the work
    directory has the rest. It is a stream, and not a context manager, because
    the handlers of loggers keep the stream that they were made with.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._kept: list[str] | None = []

    def write(self, text: str) -> int:
        if self._kept is None:
            return self.stream.write(text)
        self._kept.append(text)
        return len(text)

    def flush(self) -> None:
        if self._kept is None:
            self.stream.flush()

    def release(self) -> None:
        """Write what was kept; from now on, pass everything on."""
        kept, self._kept = self._kept, None
        if kept:
            self.stream.write(''.join(kept))
            self.stream.flush()

    def drop(self) -> None:
        """Forget what was kept; from now on, pass everything on."""
        self._kept = None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def announce(text: str) -> None:
    """Print a line at once, also while other output is held."""
    print(text, file=getattr(sys.stdout, 'stream', sys.stdout), flush=True)


def _named(error: Exception) -> Exception:
    """The error, or a TrainingError if a process of the data loader died.

    torch raises that one from a signal handler, wherever the main process is:
    as a rule it waits for the next batch, but it may be in a step. Errors of
    the data set in a loader process have other messages.
    """
    if 'DataLoader worker (pid' not in str(error):
        return error
    # the next process to die would raise while this one is reported
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return TrainingError(
        'a process of the data loader died '
        f'({" ".join(str(error).split())}); it may have run out of '
        'memory, of which fewer num_workers need less'
    )


def _with_place(error: Exception, cfg: 'Config | None') -> str:
    """The message, with the part of the config if another package wrote it."""
    place = ''
    if cfg is not None and not isinstance(error, (UsageError, TrainingError)):
        from mmauxq.engine.error_context import locate

        place = locate(error, cfg._cfg_dict)
    return f'{place}: {one_line(error)}' if place else one_line(error)


def exit_process(status: int) -> NoReturn:
    """End the process with ``status``, as the last act of a command.

    A rank of a distributed job ends at once. It has left the process group,
    but threads of Gloo may live on, and one that takes Python's lock while
    the interpreter shuts down aborts the process ("terminate called without
    an active exception").
    """
    if 'RANK' not in os.environ:
        sys.exit(status)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # loggers and visualizers write what they hold
    flush_output()
    os._exit(status)


def _is_expected(error: Exception) -> bool:
    if isinstance(error, RuntimeError) and _is_distributed():
        return False  # as a rule, another rank died
    return isinstance(error, EXPECTED)


def _print_error(message: str) -> None:
    """Print one line; in a distributed job, only from one rank.

    Other ranks wait: as a rule rank 0 has the same error, prints it first,
    and the launcher stops the rest.
    """
    flush_output()
    own = rank()
    if own:
        time.sleep(RANK_PATIENCE)
        message = f'(rank {own}) {message}'
    print(f'error: {message}', file=sys.stderr, flush=True)


def flush_output() -> None:
    """Show what was printed and logged."""
    sys.stdout.flush()
    sys.stderr.flush()


def _is_distributed() -> bool:
    torch = sys.modules.get('torch')
    return (
        torch is not None
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    )


def _leave_process_group() -> None:
    if _is_distributed():
        sys.modules['torch'].distributed.destroy_process_group()
