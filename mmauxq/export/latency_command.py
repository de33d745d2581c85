"""``tools/latency.py``."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from mmauxq import compat
from mmauxq.engine import command_line
from mmauxq.engine.checks import check_model
from mmauxq.errors import UsageError

from .command import load, number


def latency_command(argv: list[str] | None = None) -> int:
    """Print the speed of each exported form; returns the exit status."""
    parser = command_line.make_parser(
        'Measure each exported form of a network against its float export, '
        'forms taking turns. Without --checkpoint weights are random and '
        'scales come from generated images: speed does not depend on them.'
    )
    parser.add_argument('--checkpoint', metavar='FILE', help='trained network')
    parser.add_argument(
        '--batch', type=number, nargs='+', default=[1, 32], metavar='N',
        help='images at once (default: 1 32)',
    )  # fmt: skip
    parser.add_argument(
        '--threads', type=number, nargs='+', default=[1, 2], metavar='N',
        help='threads of the runtime (default: 1 2)',
    )  # fmt: skip
    parser.add_argument(
        '--rounds', type=number, default=15, metavar='N',
        help='timed runs of each form (default: 15)',
    )  # fmt: skip
    parser.add_argument(
        '--openvino', action='store_true', help='OpenVINO, too'
    )

    parser.add_argument(
        '--save', metavar='FILE', help='keep the network as a checkpoint'
    )

    def command(args: argparse.Namespace, started: Callable) -> None:
        for key in ('batch', 'threads', 'rounds'):
            values = getattr(args, key)
            if 0 in (values if isinstance(values, list) else [values]):
                raise UsageError(f'--{key} 0; allowed are 1, 2, ...')
        compat.enable()
        import torch
        from mmengine.registry import init_default_scope

        from . import latency, runtime
        from .network import check_config

        if args.checkpoint is None:
            cfg = command_line.load_config(args)
            check_model(cfg, args.config)
            init_default_scope(cfg.get('default_scope', 'mmpretrain'))
            check_config(cfg)
            network = latency.calibrated_network(cfg)
        else:
            network = load(args)
        if args.save:
            torch.save(
                dict(state_dict=network.algorithm.state_dict()), args.save
            )
        models = latency.forms_of(network)
        if args.openvino:  # before anything is timed
            latency.openvino_runner(models['float'], 1)
        print(
            f'{runtime.cpu_name()} ({", ".join(runtime.cpu_features())}); '
            f'load {os.getloadavg()[0]:.1f}'
        )
        kernels = {
            name: len(runtime.operators(model)[1])
            for name, model in models.items()
        }
        print('| runtime | batch | threads | form | integer | ms | speed-up |')
        print('| --- | ---: | ---: | --- | ---: | ---: | ---: |')
        kinds = {'onnxruntime': latency.onnxruntime_runner}
        if args.openvino:
            kinds['openvino'] = latency.openvino_runner
        for kind, make in kinds.items():
            for batch in args.batch:
                for threads in args.threads:
                    seconds = latency.latencies(
                        _runners(kind, make, models, threads),
                        (batch, *network.algorithm.cost.shape),
                        args.rounds,
                    )
                    _print_rows(
                        f'| {kind} | {batch} | {threads} |',
                        seconds,
                        kernels if kind == 'onnxruntime' else {},
                    )

    return command_line.guard(parser, argv, command)


def _runners(
    kind: str, make: Callable, models: dict[str, Any], threads: int
) -> dict[str, Callable]:
    """Those that the runtime takes; the others are named."""
    runners = {}
    for name, model in models.items():
        try:
            runners[name] = make(model, threads)
        except UsageError as error:
            if name == 'float':
                raise
            print(f'{kind}, {name}: {error}', file=sys.stderr)
    return runners


def _print_rows(
    start: str, seconds: dict[str, float], kernels: dict[str, int]
) -> None:
    for name, value in seconds.items():
        print(
            f'{start} {name} | {kernels.get(name, "")} | {1e3 * value:.2f} | '
            f'{seconds["float"] / value:.2f} |',
            flush=True,
        )
