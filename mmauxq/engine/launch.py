"""What ``tools/train.py`` and ``tools/test.py`` share.

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
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mmengine.config import Config, DictAction

from mmauxq import compat
from mmauxq.errors import TrainingError, UsageError

from .checks import (
    check_model,
    check_samples,
    check_training,
    set_work_dir,
    writable_file,
)
from .guards import add_guards, make_exact
from .locate import locate
from .options import merge_options
from .resume import named_checkpoint, set_start
from .settings import check_settings

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
COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune')
# How long another rank leaves the word to rank 0 (seconds).
RANK_PATIENCE = 10


def train(argv: list[str] | None = None) -> int:
    """Train as a config says; returns the exit status."""
    parser = make_parser('Train a classifier as CONFIG says.')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='continue from PATH, or from the newest checkpoint in the work '
        'directory (starting fresh, with a warning, when there is none)',
    )
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision'
    )
    parser.add_argument(
        '--compile',
        nargs='?',
        const='default',
        choices=COMPILE_MODES,
        metavar='MODE',
        help='torch.compile the training step: default, reduce-overhead '
        '(CUDA graphs) or max-autotune',
    )
    parser.add_argument(
        '--cuda-graph',
        action='store_true',
        help='record the training step as CUDA graphs, without a compiler',
    )

    def command(args: argparse.Namespace, started: Callable) -> None:
        cfg = args.loaded = load_config(args)
        check_model(cfg, args.config)
        check_training(cfg, args.config)
        check_settings(cfg)
        set_work_dir(cfg, args.config, args.work_dir)
        if args.amp:
            _set_amp(cfg)
        if args.compile:
            _check_joint(cfg, args, '--compile')
            cfg.model.compile = dict(mode=args.compile)
        if args.cuda_graph:
            _check_joint(cfg, args, '--cuda-graph')
            cfg.model.cuda_graph = True
        set_start(cfg, args.resume)
        make_exact(cfg)
        add_guards(cfg)
        runner = _runner(cfg, args, started)
        runner.train()
        if cfg.model.get('type') == 'mmauxq.JointQAT' and _rank() == 0:
            _write_slim(Path(cfg.work_dir))

    return guard(parser, argv, command)


def _write_slim(work_dir: Path) -> None:
    """Leave what ships, the last network alone, beside the checkpoints."""
    from mmauxq.export import save_slim

    last = named_checkpoint(work_dir)
    if last is None:
        print('No checkpoint was saved, so no slim.pth', file=sys.stderr)
        return
    size = save_slim(last, work_dir / 'slim.pth')
    print(f'{work_dir / "slim.pth"}: the network of {last.name}, {size} bytes')


def test(argv: list[str] | None = None) -> int:
    """Evaluate the low-precision network alone; returns the exit status."""
    parser = make_parser(
        'Evaluate the network of CONFIG, without its guidance, with the '
        'weights of CHECKPOINT (a training checkpoint or a slim one).'
    )
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', metavar='FILE', help='write the metrics to this JSON file'
    )

    def command(args: argparse.Namespace, started: Callable) -> None:
        cfg = args.loaded = load_config(args)
        check_model(cfg, args.config)
        for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
            if cfg.get(key) is None:
                raise UsageError(f'{args.config} has no `{key}`')
        out = writable_file(args.out) if args.out else None
        compat.load_checkpoint(args.checkpoint)  # before anything is built
        set_work_dir(cfg, args.config, args.work_dir)
        if cfg.model.get('type') == 'mmauxq.JointQAT':
            cfg.model.guidance = None
        cfg.resume, cfg.load_from = False, args.checkpoint
        runner = _runner(cfg, args, started)
        runner.register_hook(_fit_check(args.checkpoint), 'LOWEST')
        metrics = {k: _plain(v) for k, v in runner.test().items()}
        if _rank() == 0:
            line = json.dumps(metrics)
            if out is not None:
                out.write_text(line + '\n')
            _flush_logs()
            print(line, flush=True)

    return guard(parser, argv, command)


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


# --- the two phases --------------------------------------------------------


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
    _flush_logs()
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
    _flush_logs()
    rank = _rank()
    if rank:
        time.sleep(RANK_PATIENCE)
        message = f'(rank {rank}) {message}'
    print(f'error: {message}', file=sys.stderr, flush=True)


def _rank() -> int:
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        if os.environ.get(name, '').isdigit():
            return int(os.environ[name])
    return 0


def _flush_logs() -> None:
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


# --- the runner ------------------------------------------------------------


def _set_amp(cfg: Config) -> None:
    import torch

    if torch.cuda.is_available():
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        # bfloat16 has the range of float32: no gradient is lost without a
        # scale, and no step passed over that has an infinite one
        bfloat16 = cfg.optim_wrapper.get('dtype') == 'bfloat16'
        scale = dict(enabled=False) if bfloat16 else 'dynamic'
        cfg.optim_wrapper.setdefault('loss_scale', scale)
    else:
        cfg.optim_wrapper.type = 'mmauxq.CPUAmpOptimWrapper'


def _check_joint(cfg: Config, args: argparse.Namespace, option: str) -> None:
    if cfg.model.get('type') != 'mmauxq.JointQAT':
        raise UsageError(
            f'{option}: {args.config} trains a {cfg.model.get("type")}; '
            'allowed are recipes of mmauxq.JointQAT'
        )


def _runner(cfg: Config, args: argparse.Namespace, started: Callable):
    """Build the runner; ``started`` is called at the first iteration."""
    compat.enable()
    from mmengine.registry import RUNNERS
    from mmengine.runner import Runner

    if args.launcher != 'none':
        _set_distributed(cfg, args.launcher)
    if 'runner_type' in cfg:
        runner = RUNNERS.build(cfg)
    else:
        runner = Runner.from_cfg(cfg)
    runner.register_hook(_start_mark(started), 'VERY_HIGH')
    from mmauxq.engine.hooks import EpochLengthHook, TeacherCheckHook

    runner.register_hook(TeacherCheckHook())
    runner.register_hook(EpochLengthHook())
    return runner


def _set_distributed(cfg: Config, launcher: str) -> None:
    """Without a GPU: processes on the CPU that talk through gloo.

    MMEngine's ``launcher='pytorch'`` always selects a CUDA device, but it
    leaves a process group alone that exists already.
    """
    import torch

    if torch.cuda.is_available():
        local, gpus = int(os.environ['LOCAL_RANK']), torch.cuda.device_count()
        if launcher == 'pytorch' and local >= gpus:
            raise UsageError(
                f'process {local} of this machine has no GPU (it has {gpus})'
            )
        return
    if launcher != 'pytorch':
        raise UsageError(
            f'--launcher {launcher} needs a GPU; without one, '
            'use tools/dist_train.sh'
        )
    if 'RANK' not in os.environ:
        raise UsageError(
            '--launcher pytorch is for torchrun; '
            'use tools/dist_train.sh CONFIG GPUS'
        )
    if cfg.get('sync_bn'):
        raise UsageError('sync_bn needs a GPU; set sync_bn=None')
    torch.distributed.init_process_group('gloo')
    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)


def _start_mark(started: Callable):
    from mmengine.hooks import Hook

    class StartMark(Hook):
        """Tells when set-up is over."""

        def before_train(self, runner) -> None:
            check_samples(runner)
            started()

        def before_test(self, runner) -> None:
            started()

    return StartMark()


def _fit_check(path: str):
    from mmengine.hooks import Hook
    from mmengine.model import is_model_wrapper

    class FitCheck(Hook):
        """Refuses a checkpoint that leaves part of the network unset.

        MMEngine only warns, and would evaluate random weights.
        """

        def after_load_checkpoint(self, runner, checkpoint) -> None:
            model = runner.model
            model = model.module if is_model_wrapper(model) else model
            state = checkpoint.get('state_dict', checkpoint)
            state = {k.removeprefix('module.'): v for k, v in state.items()}
            try:
                missing = model.load_state_dict(state, False).missing_keys
            except RuntimeError as error:
                detail = str(error).split('\n')[1:2] or [str(error)]
                raise UsageError(
                    f'checkpoint {path} is of another architecture: '
                    f'{detail[0].strip()}'
                ) from error
            wrong = [
                f'{key} is {state[key].dtype} there and {value.dtype} here'
                for key, value in model.state_dict().items()
                if key in state
                and state[key].is_floating_point() != value.is_floating_point()
            ]
            if wrong:
                raise UsageError(
                    f'checkpoint {path} is of another architecture: {wrong[0]}'
                )
            # Some backbones drop, as they load, what they compute anew.
            state |= {f'architecture.{k}': v for k, v in state.items()}
            missing = [
                k
                for k in missing
                if 'num_batches_tracked' not in k and k not in state
            ]
            if missing:
                raise UsageError(
                    f'checkpoint {path} is of another architecture: '
                    f'{len(missing)} entries are missing, such as '
                    f'{", ".join(missing[:3])}'
                )

    return FitCheck()


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, 'tolist') else value
