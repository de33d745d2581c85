"""Evaluate the network of CONFIG, without its guidance, with the weights of
CHECKPOINT (a training checkpoint or a slim one)."""

import argparse
import json
from collections.abc import Callable

from mmauxq import compat
from mmauxq.errors import UsageError
from mmauxq.files import check_file, write_atomically
from mmauxq.ranks import rank

from .load_config import load_config
from .parser import add_config_arguments, add_runner_arguments

QUIET_SETUP = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', metavar='FILE', help='write the metrics to this JSON file'
    )
    add_runner_arguments(parser)


def run(args: argparse.Namespace, mark_running: Callable) -> None:
    """Evaluate, and print the metrics as one line of JSON."""
    cfg = load_config(args)
    from mmauxq.checkpoint_file import read_checkpoint
    from mmauxq.engine.build_runner import build_runner, set_work_dir

    for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
        if cfg.get(key) is None:
            raise UsageError(f'{args.config} has no `{key}`')
    if args.out:
        check_file('--out', args.out)
    read_checkpoint(args.checkpoint)  # before anything is built
    set_work_dir(cfg, args.config, args.work_dir)
    if cfg.model.get('type') == 'mmauxq.JointQAT':
        cfg.model.guidance = None
    cfg.resume, cfg.load_from = False, args.checkpoint
    compat.enable()
    from mmauxq.engine.hooks import CheckpointFitHook
    from mmauxq.engine.image_shape import set_image_shape

    set_image_shape(cfg, 'val')
    runner = build_runner(cfg, mark_running)
    runner.register_hook(CheckpointFitHook(args.checkpoint))
    metrics = runner.test()
    if rank() == 0:
        line = json.dumps(metrics, default=lambda value: value.tolist())
        if args.out:
            write_atomically(args.out, f'{line}\n'.encode())
        print(line, flush=True)
