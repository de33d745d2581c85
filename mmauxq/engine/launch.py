"""The commands ``tools/train.py`` and ``tools/test.py``."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmauxq import compat
from mmauxq.errors import UsageError

from .checks import (
    check_model,
    check_samples,
    check_training,
    set_work_dir,
    writable_file,
)
from .command_line import (
    flush_logs,
    guard,
    load_config,
    make_parser,
    rank,
)
from .guards import add_guards, make_exact
from .resume import named_checkpoint, set_start
from .settings import check_settings

COMPILE_MODES = ('default', 'reduce-overhead', 'max-autotune')


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
        help='record the training step as CUDA graphs, without a compiler, '
        "and use the fused form of torch's optimizer",
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
            _set_cuda_graph(cfg)
        set_start(cfg, args.resume)
        make_exact(cfg)
        add_guards(cfg)
        runner = _runner(cfg, args, started)
        runner.train()
        if cfg.model.get('type') == 'mmauxq.JointQAT' and rank() == 0:
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
        if rank() == 0:
            line = json.dumps(metrics)
            if out is not None:
                out.write_text(line + '\n')
            flush_logs()
            print(line, flush=True)

    return guard(parser, argv, command)


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


def _set_cuda_graph(cfg: Config) -> None:
    """Record the step; launch the optimizer in one go as well.

    A fused one also looks itself whether its gradients are finite, so that
    the host need not wait for them.
    """
    import torch

    from .optimizers import optimizer_takes

    compat.enable()  # its type may be one of MMPretrain's
    cfg.model.cuda_graph = True
    optimizer = cfg.optim_wrapper.get('optimizer')
    if (
        torch.cuda.is_available()
        and isinstance(optimizer, dict)
        and not {'fused', 'foreach', 'differentiable'} & set(optimizer)
        and optimizer_takes(optimizer, 'fused')
    ):
        optimizer.fused = True


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

    from .running import bare_model

    class FitCheck(Hook):
        """Refuses a checkpoint that leaves part of the network unset.

        MMEngine only warns, and would evaluate random weights.
        """

        def after_load_checkpoint(self, runner, checkpoint) -> None:
            model = bare_model(runner)
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
