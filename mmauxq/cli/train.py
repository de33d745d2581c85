"""Train a classifier as CONFIG says."""

import argparse
import inspect
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from mmauxq import compat
from mmauxq.config_types import joint_section, type_name
from mmauxq.errors import UsageError, check_choice, visible
from mmauxq.ranks import rank

from .load_config import load_config
from .parser import add_config_arguments, add_runner_arguments

if TYPE_CHECKING:
    from mmengine.config import Config

QUIET_SETUP = True
WRAPPERS = (
    'OptimWrapper',
    'AmpOptimWrapper',
    'mmauxq.AutoAmpOptimWrapper',
    'mmauxq.CPUAmpOptimWrapper',
)
"""Optimizer wrappers of which ``--no-amp`` knows the settings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add_runner_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='continue from PATH, or from the newest checkpoint in the work '
        'directory (starting fresh, with a warning, when there is none)',
    )
    parser.add_argument(
        '--amp',
        action=argparse.BooleanOptionalAction,
        help='mixed precision (on a GPU in float16, unless '
        'optim_wrapper.dtype says bfloat16), or float32; by default as the '
        'config says',
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument(
        '--eager',
        action='store_true',
        help='run the training step as it is written, in operations of torch; '
        'by default a GPU replays it as CUDA graphs where it can',
    )
    forms.add_argument(
        '--compile',
        nargs='?',
        const='default',
        choices=('default', 'reduce-overhead', 'max-autotune'),
        metavar='MODE',
        help='torch.compile the training step: default, reduce-overhead '
        '(CUDA graphs) or max-autotune',
    )
    forms.add_argument(
        '--cuda-graph',
        action='store_true',
        help='replay the training step as CUDA graphs, or end where that '
        'cannot be',
    )


def run(args: argparse.Namespace, mark_running: Callable) -> None:
    """Train, and leave ``slim.pth`` beside the checkpoints."""
    cfg = load_config(args, lambda cfg: _set_precision(cfg, args.amp))
    from mmauxq.engine.build_runner import build_runner, set_work_dir
    from mmauxq.engine.config_validation import check_settings
    from mmauxq.engine.defaults import apply_defaults
    from mmauxq.engine.image_shape import set_image_shape
    from mmauxq.engine.resume import set_start
    from mmauxq.engine.running import end_loaders

    check_settings(cfg, args.config)
    set_work_dir(cfg, args.config, args.work_dir)
    if rank() == 0:
        # at once, while other output is held
        shown = getattr(sys.stdout, 'stream', sys.stdout)
        where = visible(cfg.work_dir)
        print(f'Setting up; logs go to {where}', file=shown, flush=True)
    apply_defaults(cfg)
    joint = joint_section(cfg.model) is not None
    _set_speed(cfg, args, joint)
    set_start(cfg, args.resume)
    compat.enable()
    from mmauxq.engine.hooks import CheckpointFitHook

    set_image_shape(cfg)
    runner = build_runner(cfg, mark_running)
    _log_amp(cfg)
    if joint and cfg.get('load_from') and not cfg.get('resume'):
        runner.register_hook(CheckpointFitHook(cfg.load_from, False))
    runner.train()
    end_loaders(runner)
    if joint and rank() == 0:
        _write_slim(cfg)


def _write_slim(cfg: 'Config') -> None:
    """Leave what ships, the last network alone, beside the checkpoints."""
    from mmauxq.deploy import slim_checkpoint
    from mmauxq.engine.resume import checkpoint_folder, named_checkpoint

    work_dir = Path(cfg.work_dir)
    last = named_checkpoint(work_dir, checkpoint_folder(cfg, work_dir))
    if last is None:
        print('No checkpoint was saved, so no slim.pth', file=sys.stderr)
        return
    size = slim_checkpoint(last, work_dir / 'slim.pth')
    slim = visible(str(work_dir / 'slim.pth'))
    print(f'{slim}: the network of {last.name}, {size} bytes')


def _set_precision(cfg: 'Config', amp: bool | None) -> None:
    """Choose the optimizer wrapper that ``--amp`` or ``--no-amp`` asks for."""
    section = cfg.get('optim_wrapper')
    if amp is None or not isinstance(section, dict):  # refused later
        return
    if amp:
        section.type = 'AmpOptimWrapper'
        return
    kind = type_name(section.get('type', 'OptimWrapper'))
    check_choice('--no-amp: optim_wrapper.type', kind, WRAPPERS)
    section.type = 'OptimWrapper'
    for key in ('dtype', 'loss_scale', 'use_fsdp'):
        section.pop(key, None)


def _log_amp(cfg: 'Config') -> None:
    """Log the precision of MMEngine's wrapper; ours do it themselves."""
    import torch

    from mmauxq.engine.optimizers import log_autocast

    section = cfg.optim_wrapper
    if type_name(section.get('type')) == 'AmpOptimWrapper':
        dtype = section.get('dtype') or torch.get_autocast_dtype('cuda')
        log_autocast(dtype)


def _set_speed(cfg: 'Config', args: argparse.Namespace, joint: bool) -> None:
    """Choose the form of the step, and the optimizer's that goes with it.

    The kernels of a fused optimizer skip a step whose gradients are not
    finite, so that the host need not wait for them.
    """
    forms = 'eager', 'compile', 'cuda_graph'
    chosen = [form for form in forms if getattr(args, form)]
    if not joint:
        if chosen:
            raise UsageError(
                f'--{chosen[0].replace("_", "-")}: expected a recipe of '
                f'mmauxq.JointQAT, got {args.config}, which trains '
                f'{cfg.model.get("type")}'
            )
        return
    speed = cfg.model.get('speed')
    options = dict(speed) if isinstance(speed, dict) else {}
    if args.eager:
        cfg.model.speed = 'eager'
    elif args.compile:
        cfg.model.speed = {**options, 'compile': dict(mode=args.compile)}
    elif args.cuda_graph:
        cfg.model.speed = {**options, 'cuda_graph': True}
    speed = cfg.model.get('speed')
    if speed in (None, 'auto') or (
        isinstance(speed, dict)
        and not speed.get('compile')
        and speed.get('cuda_graph') is not False
    ):
        _fuse_optimizer(cfg)


def _fuse_optimizer(cfg: 'Config') -> None:
    import torch

    optimizer = cfg.optim_wrapper.get('optimizer')
    if (
        torch.cuda.is_available()
        and isinstance(optimizer, dict)
        and not {'fused', 'foreach', 'differentiable'} & set(optimizer)
        and 'fused' in _optimizer_arguments(optimizer['type'])
    ):
        optimizer.fused = True


def _optimizer_arguments(kind: str | type) -> Collection[str]:
    from mmengine.registry import OPTIMIZERS

    compat.enable()  # it may be one of MMPretrain's
    if isinstance(kind, str):
        with OPTIMIZERS.switch_scope_and_registry(None) as registry:
            found = registry.get(kind)
        if found is None:  # MMEngine says "None is not a callable object"
            raise UsageError(f'optimizer {kind!r} is not registered')
        kind = found
    return inspect.signature(kind).parameters
