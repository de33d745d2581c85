"""How a command runs, and how it ends.

Everything up to the first iteration is the set-up. The user can mend what
goes wrong there, so it ends as one line on stderr and exit status 2
(``--debug`` shows the traceback). From the first iteration on, errors keep
their traceback and exit with 1, except :class:`~mmauxq.errors.UsageError`.
A :class:`~mmauxq.errors.TrainingError` is one line and exit status 1, whenever
it happens, and so is a full disk. SIGINT and SIGTERM are one line and exit
status 130 and 143.
"""

import atexit
import errno
import io
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from mmauxq import compat
from mmauxq.errors import TrainingError, UsageError, one_line, visible
from mmauxq.ranks import rank
from mmauxq.stopping import (
    LAUNCHER,
    Stopped,
    end_with,
    finish,
    stoppable,
)

from .parser import Parser

if TYPE_CHECKING:
    from mmengine.config import Config

# What a wrong config raises in the builders of MMEngine and of torch.
EXPECTED = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError,
    OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG}
"""What a disk that is full, read-only or broken says."""
LOADER_DIED = ('DataLoader worker (pid', 'Pin memory thread exited')
"""What torch's errors say when a process of the data loader dies."""
RANK_PATIENCE = 10
"""Seconds after which other ranks report an error that rank 0 has not."""
SIGNAL_PATIENCE = 0.5
"""Seconds in which a signal that ended other processes reaches this one."""
UNDER_TORCHRUN = 'TORCHELASTIC_RUN_ID'
"""Environment variable of the ranks that torchrun starts."""


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
    try:
        with stoppable() as check, _visible_logs():
            return _run_command(command, argv, prog, check)
    except Stopped as stopped:
        if UNDER_TORCHRUN not in os.environ and not rank():
            line = stopped.line(command.__name__.rpartition('.')[2])
            print(line, file=sys.stderr, flush=True)
        return stopped.status


def build_parser(command: ModuleType, prog: str | None = None) -> Parser:
    """The parser of all arguments of a command.

    Args:
        command: A module as :mod:`mmauxq.cli` describes it.
        prog: See :func:`run_command`.
    """
    parser = Parser(prog=prog, description=command.__doc__)
    command.add_arguments(parser)
    parser.add_argument(
        '--debug', action='store_true', help='show tracebacks of all errors'
    )
    return parser


def _run_command(
    command: ModuleType,
    argv: list[str],
    prog: str | None,
    check_signals: Callable[[], None],
) -> int:
    if UNDER_TORCHRUN in os.environ:
        end_with(int(os.environ.get(LAUNCHER) or os.getppid()))
    parser = build_parser(command, prog)
    compat.silence_neighbours()
    debug = '--debug' in argv
    held = HeldOutput(sys.stdout)
    running = False

    def mark_running() -> None:
        nonlocal running
        running = True
        held.release()

    args, status = None, 1
    try:
        args = parser.parse_args(argv)
        local = getattr(args, 'local_rank', 0)
        os.environ.setdefault('LOCAL_RANK', str(local))
        if getattr(command, 'QUIET_SETUP', False) and not debug:
            sys.stdout = held  # type: ignore[assignment]
        status = command.run(args, mark_running) or 0
    except BaseException as raised:
        if args is None and isinstance(raised, SystemExit):
            raise  # --help
        loader_died = _loader_died(raised)
        if running or loader_died:
            _ignore_dying_loaders()
        if loader_died or _is_distributed():
            time.sleep(SIGNAL_PATIENCE)
        check_signals()
        error = _named(raised, getattr(args, 'loaded', None))
        mendable = isinstance(error, UsageError)
        mendable |= not running and _is_expected(error)
        known = mendable or isinstance(error, TrainingError)
        held.release(show=not known)  # MMEngine's output would hide the line
        if debug or not known:
            text = visible(traceback.format_exc(), '\n\t')
            print(text, end='', file=sys.stderr, flush=True)
        if known:
            _print_error(_with_place(error, getattr(args, 'loaded', None)))
        status = 2 if mendable else 1
    finally:
        if sys.stdout is held:
            held.release(show=running or not status)
            sys.stdout = held.stream
    if _is_distributed():
        if 'mmauxq.accelerate' in sys.modules:
            sys.modules['mmauxq.accelerate'].release_recordings()
        sys.modules['torch.distributed'].destroy_process_group()
    return status


@contextmanager
def _visible_logs() -> Iterator[None]:
    """Log lines hold no characters that a terminal obeys, whatever the text
    of a file is; one that cannot be written is left out, without a traceback.
    """
    make, shown = logging.getLogRecordFactory(), logging.raiseExceptions

    def record(*args: Any, **options: Any) -> logging.LogRecord:
        made = make(*args, **options)
        if isinstance(made.msg, str):
            made.msg, made.args = visible(made.getMessage(), '\n\t'), None
        return made

    logging.setLogRecordFactory(record)
    logging.raiseExceptions = False
    try:
        yield
    finally:
        logging.setLogRecordFactory(make)
        logging.raiseExceptions = shown


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


def _ignore_dying_loaders() -> None:
    """From now on no process of a data loader that dies is an error: torch's
    handler of the signal would raise it while another one is reported."""
    if threading.current_thread() is not threading.main_thread():
        return
    while True:
        try:
            # not SIG_DFL: Python complains of a signal that waits for a
            # handler
            signal.signal(signal.SIGCHLD, lambda *_: None)
            return
        except RuntimeError:  # torch's, of one more process
            continue


def _loader_died(error: BaseException) -> bool:
    """Whether an error comes of a process of the data loader that died.

    torch raises one from a signal handler, so also in a step. Before it does,
    the process may be missed where its batch is received: a tensor is asked
    for by a connection. Errors of the data set in a loader process have other
    messages.
    """
    if any(words in str(error) for words in LOADER_DIED):
        return True
    return isinstance(error, (OSError, EOFError)) and any(
        frame.name == '_try_get_data'  # of torch.utils.data.dataloader
        for frame in traceback.extract_tb(error.__traceback__)
    )


def _named(error: BaseException, cfg: 'Config | None') -> BaseException:
    """The error, or a TrainingError if it is one of the machine: the disk is
    full, or a process of the data loader died."""
    if isinstance(error, OSError) and error.errno in DISK:
        where = error.filename or (cfg and cfg.get('work_dir')) or 'a file'
        return TrainingError(
            f'{where} cannot be written: {error.strerror}; files that were '
            'complete before are unchanged'
        )
    if not _loader_died(error):
        return error
    what = str(error) or type(error).__name__
    return TrainingError(
        f'a process of the data loader died ({what}); it may have run out of '
        'memory, of which fewer num_workers need less'
    )


def _with_place(error: BaseException, cfg: 'Config | None') -> str:
    """The message, with the part of the config if another package wrote it."""
    message = one_line(error)
    if cfg is None or isinstance(error, (UsageError, TrainingError)):
        return message
    from mmauxq.engine.error_context import locate

    place = locate(error, cfg._cfg_dict)
    return f'{place}: {message}' if place else message


def exit_process(status: int) -> NoReturn:
    """End the process with ``status``, as the last act of a command.

    A command that was stopped, and a rank of a distributed job, skip the end
    of the interpreter: a thread, such as one of Gloo, that takes Python's lock
    meanwhile would abort the process ("terminate called without an active
    exception").
    """
    finish()
    stopped = status >= 128
    if 'RANK' not in os.environ and not stopped:
        sys.exit(status)
    for thread in () if stopped else threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # loggers and visualizers write what they hold
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_expected(error: BaseException) -> bool:
    if isinstance(error, TrainingError):
        return False
    if isinstance(error, RuntimeError) and _is_distributed():
        return False  # as a rule, another rank died
    return isinstance(error, EXPECTED) or not isinstance(error, Exception)


def _print_error(message: str) -> None:
    """Print one line; in a distributed job, as a rule from rank 0 alone.

    Other ranks wait: if rank 0 has the same error, the launcher stops them.
    """
    sys.stdout.flush()
    own = rank()
    if own:
        time.sleep(RANK_PATIENCE)
        message = f'(rank {own}) {message}'
    print(f'error: {visible(message)}', file=sys.stderr, flush=True)


def _is_distributed() -> bool:
    module = sys.modules.get('torch.distributed')
    return hasattr(module, 'is_initialized') and module.is_initialized()
