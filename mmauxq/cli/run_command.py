"""How a command runs, and how it ends.

Everything up to the first iteration is the set-up. The user can mend what
goes wrong there, so it ends as one line on stderr and exit status 2
(``--debug`` shows the traceback). From the first iteration on, errors keep
their traceback and exit with 1, except :class:`~mmauxq.errors.UsageError`.
A :class:`~mmauxq.errors.TrainingError` is one line and exit status 1, whenever
it happens.
"""

import atexit
import io
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

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
        command: A module as :mod:`mmauxq.cli` describes it. Its ``run`` may
            return an exit status; ``None`` is 0. With ``QUIET_SETUP``, the
            output of the set-up is shown when the set-up is over.
        argv: Arguments; by default those of the process.
        prog: The name in its help; by default the file that was started.

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

    args, status = None, 0
    try:
        args = parser.parse_args(argv)
        local = getattr(args, 'local_rank', 0)
        os.environ.setdefault('LOCAL_RANK', str(local))
        if getattr(command, 'QUIET_SETUP', False) and not debug:
            sys.stdout = held  # type: ignore[assignment]
        status = command.run(args, mark_running) or 0
    except Exception as raised:
        error = _named(raised)
        mendable = isinstance(error, UsageError)
        mendable |= not running and _is_expected(error)
        known = mendable or isinstance(error, TrainingError)
        held.release(show=not known)  # MMEngine's output would hide the line
        if debug or not known:
            traceback.print_exc()
        if known:
            _print_error(_with_place(error, getattr(args, 'loaded', None)))
        status = 2 if mendable else 1
    finally:
        if sys.stdout is held:
            held.release()
            sys.stdout = held.stream
        if _is_distributed():
            sys.modules['torch.distributed'].destroy_process_group()
    return status


class HeldOutput:
    """A text stream that keeps what is written until it is released.

    An error would be lost among the 170 lines of MMEngine before the first
    iteration. Loggers keep this stream, which passes everything on later.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._target: Any = io.StringIO()

    def write(self, text: str) -> int:
        return self._target.write(text)

    def flush(self) -> None:
        self._target.flush()

    def release(self, show: bool = True) -> None:
        """Write what was kept, or forget it; from now on, keep nothing."""
        kept, self._target = self._target, self.stream
        if show and kept is not self.stream:
            self.stream.write(kept.getvalue())
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def _named(error: Exception) -> Exception:
    """The error, or a TrainingError if a process of the data loader died.

    torch raises that one from a signal handler, so also in a step. Errors of
    the data set in a loader process have other messages.
    """
    if 'DataLoader worker (pid' not in str(error):
        return error
    # the next process to die would raise while this one is reported
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return TrainingError(
        f'a process of the data loader died ({error}); it may have run out of '
        'memory, of which fewer num_workers need less'
    )


def _with_place(error: Exception, cfg: 'Config | None') -> str:
    """The message, with the part of the config if another package wrote it."""
    message = one_line(error)
    if cfg is None or isinstance(error, (UsageError, TrainingError)):
        return message
    from mmauxq.engine.error_context import locate

    place = locate(error, cfg._cfg_dict)
    return f'{place}: {message}' if place else message


def exit_process(status: int) -> NoReturn:
    """End the process with ``status``, as the last act of a command.

    A rank of a distributed job skips the end of the interpreter: a thread of
    Gloo that takes Python's lock meanwhile would abort the process ("terminate
    called without an active exception").
    """
    if 'RANK' not in os.environ:
        sys.exit(status)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # loggers and visualizers write what they hold
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_expected(error: Exception) -> bool:
    if isinstance(error, RuntimeError) and _is_distributed():
        return False  # as a rule, another rank died
    return isinstance(error, EXPECTED)


def _print_error(message: str) -> None:
    """Print one line; in a distributed job, as a rule from rank 0 alone.

    Other ranks wait: if rank 0 has the same error, the launcher stops them.
    """
    sys.stdout.flush()
    own = rank()
    if own:
        time.sleep(RANK_PATIENCE)
        message = f'(rank {own}) {message}'
    print(f'error: {message}', file=sys.stderr, flush=True)


def _is_distributed() -> bool:
    module = sys.modules.get('torch.distributed')
    return hasattr(module, 'is_initialized') and module.is_initialized()
