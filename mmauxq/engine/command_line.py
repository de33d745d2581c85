"""What the commands share: options, config, and how they end.

A command has two phases. Everything up to the first iteration - reading the
config, checking the inputs, building the runner, loading a checkpoint - is
the set-up: what goes wrong there is something the user can mend, so it ends
as one line on stderr and exit status 2 (``--debug`` shows the traceback).
From the first iteration on, errors keep their traceback and exit with 1,
except :class:`~mmauxq.errors.UsageError`. A
:class:`~mmauxq.errors.TrainingError` is one line and exit status 1, whenever
it happens.
"""

import argparse
import atexit
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from mmengine.config import Config, DictAction

from mmauxq import compat
from mmauxq.errors import TrainingError, UsageError

from .locate import locate
from .options import merge_options

# What a wrong config raises in the builders of MMEngine and of torch.
EXPECTED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# How long another rank leaves the word to rank 0 (seconds).
RANK_PATIENCE = 10


def load_config(args: argparse.Namespace) -> Config:
    """Read the config file and lay the command-line options over it."""
    path = args.config
    if not Path(path).is_file():
        raise UsageError(f'config {path} does not exist or is not a file')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:  # a config is code: it may raise anything
        if compat.needs_pkg_resources(error):
            raise UsageError(
                f'config {path}: bases such as mmpretrain:: need '
                'pkg_resources: pip install "setuptools<82"'
            ) from error
        raise UsageError(f'config {path}: {one_line(error)}') from error
    merge_options(cfg, args.cfg_options or {}, '--cfg-options')
    cfg.launcher = args.launcher
    return cfg


def one_line(error: BaseException, width: int = 600) -> str:
    """The message of an error without line breaks and without its type,
    unless the message alone would not make sense."""
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    text = ' '.join(text.split())
    if isinstance(error, KeyError) and ' ' not in text:
        text = f'missing key {text!r}'
    elif not isinstance(error, (UsageError, TrainingError, KeyError)):
        text = f'{type(error).__name__}: {text}'
    return text if len(text) <= width else text[: width - 3] + '...'


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f'{message} (see {self.prog} --help)')


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = _Parser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir',
        help='where logs and checkpoints go (default: '
        './work_dirs/NAME-OF-CONFIG)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, such as '
        'model.guidance.loss_weight=0.3 or data.key="[a,b]"',
    )
    parser.add_argument(
        '--launcher',
        default='none',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        help='job launcher',
    )
    # torch.distributed.launch writes one or the other.
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help=argparse.SUPPRESS,
    )
    parser.add_argument(
        '--debug', action='store_true', help='show tracebacks of all errors'
    )
    return parser


def guard(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    command: Callable[[argparse.Namespace, Callable], None],
) -> int:
    """Run a command under the error policy of this file."""
    argv = sys.argv[1:] if argv is None else argv
    compat.silence_neighbours()
    debug = '--debug' in argv
    running = False

    def started() -> None:
        nonlocal running
        running = True

    args = None
    try:
        args = _parse(parser, argv)
        command(args, started)
    except Exception as raised:
        error = _named(raised)
        mendable = isinstance(error, UsageError) or (
            not running and _is_expected(error)
        )
        known = mendable or isinstance(error, TrainingError)
        if debug or not known:
            traceback.print_exc()
        if known:
            _complain(_with_place(error, getattr(args, 'loaded', None)))
        return 2 if mendable else 1
    finally:
        _leave_process_group()
    return 0


def _named(error: Exception) -> Exception:
    """The error, or what to say instead if a loader process died.

    torch raises that one from a signal handler, so wherever the main process
    stands: as a rule it waits for the next batch, but it may be in a step.
    What a data set raises in a loader process comes with its own words.
    """
    if 'DataLoader worker (pid' not in str(error):
        return error
    # the next one to die would raise again, while this one is reported
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return TrainingError(
        'a process of the data loader died '
        f'({" ".join(str(error).split())}); it may have run out of '
        'memory: fewer num_workers need less'
    )


def _with_place(error: Exception, cfg: Config | None) -> str:
    """The message, with the part of the config if another package wrote it."""
    place = ''
    if cfg is not None and not isinstance(error, (UsageError, TrainingError)):
        place = locate(error, cfg._cfg_dict)
    return f'{place}: {one_line(error)}' if place else one_line(error)


def leave(status: int) -> NoReturn:
    """End the process with ``status``, as the last act of a command.

    A rank of a distributed job ends at once. It has left the process group,
    but threads of Gloo may live on, and one that asks for Python's lock while
    the interpreter shuts down aborts the process ("terminate called without
    an active exception"): seen once, after a complete evaluation.
    """
    if 'RANK' not in os.environ:
        sys.exit(status)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # loggers and visualizers write what they hold
    flush_logs()
    os._exit(status)


def _parse(parser: argparse.ArgumentParser, argv: list[str]):
    try:
        args = parser.parse_args(argv)
    except UsageError:
        raise
    except Exception as error:  # DictAction raises through argparse
        raise UsageError(
            '--cfg-options takes KEY=VALUE pairs such as '
            f'train_cfg.max_epochs=10 ({one_line(error)})'
        ) from error
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def _is_expected(error: Exception) -> bool:
    from mmengine.config.utils import ConfigParsingError

    if isinstance(error, RuntimeError) and _is_distributed():
        return False  # as a rule, another rank died
    return isinstance(error, (*EXPECTED, ConfigParsingError))


def _complain(message: str) -> None:
    """Print one line; in a distributed job, only from one rank.

    Another rank waits, so that rank 0, which as a rule has the same trouble,
    speaks first and the launcher stops the rest.
    """
    flush_logs()
    own = rank()
    if own:
        time.sleep(RANK_PATIENCE)
        message = f'(rank {own}) {message}'
    print(f'error: {message}', file=sys.stderr, flush=True)


def rank() -> int:
    """Of this process, 0 outside of a distributed job."""
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        if os.environ.get(name, '').isdigit():
            return int(os.environ[name])
    return 0


def flush_logs() -> None:
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
