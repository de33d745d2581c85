"""Evaluate the network of CONFIG, without its guidance, with the weights of
CHECKPOINT (a training checkpoint or a slim one)."""

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from mmauxq import compat
from mmauxq.config_types import joint_section
from mmauxq.errors import UsageError
from mmauxq.files import check_file, write_atomically
from mmauxq.ranks import rank

from .load_config import load_config
from .parser import add_config_arguments, add_runner_arguments

if TYPE_CHECKING:
    from mmengine.config import Config

QUIET_SETUP = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', metavar='FILE', help='write the metrics to this JSON file'
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: that of `tta_model` and `tta_pipeline` '
        'in the config, by default the mean of an image and its mirror image',
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
    if args.tta:
        _use_tta(cfg)
    joint = joint_section(cfg.model)
    if joint is not None:
        joint['guidance'] = None
    cfg.resume, cfg.load_from = False, args.checkpoint
    compat.enable()
    from mmauxq.engine.hooks import CheckpointFitHook
    from mmauxq.engine.image_shape import set_image_shape
    from mmauxq.engine.running import end_loaders

    set_image_shape(cfg, 'val')
    runner = build_runner(cfg, mark_running)
    runner.register_hook(CheckpointFitHook(args.checkpoint))
    metrics = runner.test()
    end_loaders(runner)
    if rank() == 0:
        line = json.dumps(metrics, default=lambda value: value.tolist())
        if args.out:
            write_atomically(args.out, f'{line}\n'.encode())
        print(line, flush=True)


def _use_tta(cfg: 'Config') -> None:
    """Wrap the model and change the pipeline, as MMPretrain's test.py."""
    dataset = cfg.test_dataloader.get('dataset')
    pipeline = cfg.get('tta_pipeline')
    if pipeline is None:
        steps = dataset.get('pipeline') if isinstance(dataset, dict) else None
        if not steps:
            raise UsageError(
                '--tta: expected a `pipeline` of test_dataloader.dataset, or '
                'a `tta_pipeline`, got none'
            )
        *before, last = steps
        flips = [dict(type='RandomFlip', prob=p) for p in (1.0, 0.0)]
        both = dict(type='TestTimeAug', transforms=[flips, [last]])
        pipeline = [*before, both]
    dataset['pipeline'] = pipeline
    model = cfg.get('tta_model') or dict(type='AverageClsScoreTTA')
    cfg.model = dict(model, module=cfg.model)
