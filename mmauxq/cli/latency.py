"""Measure each exported form of a network against its float export, forms
taking turns. Without --checkpoint weights are random and scales come from
generated images: speed does not depend on them."""

import argparse
import io
import os
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

from mmauxq import compat
from mmauxq.errors import UsageError
from mmauxq.files import check_file, write_atomically
from mmauxq.optional import need
from mmauxq.text import table, table_row

from .export import load
from .load_config import load_config
from .parser import add_config_arguments, integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument('--checkpoint', metavar='FILE', help='trained network')
    parser.add_argument(
        '--batch', type=integer(1), nargs='+', default=[1, 32], metavar='N',
        help='images at once (default: 1 32)',
    )  # fmt: skip
    parser.add_argument(
        '--threads', type=integer(1), nargs='+', default=[1, 2], metavar='N',
        help='threads of the runtime (default: 1 2)',
    )  # fmt: skip
    parser.add_argument(
        '--rounds', type=integer(1), default=15, metavar='N',
        help='timed runs of each form (default: 15)',
    )  # fmt: skip
    parser.add_argument(
        '--openvino', action='store_true', help='OpenVINO, too'
    )
    parser.add_argument(
        '--save', metavar='FILE', help='keep the network as a checkpoint'
    )


def run(args: argparse.Namespace, mark_running: Callable) -> None:
    """Print a table of milliseconds."""
    need('onnx', 'onnxscript', 'onnxruntime')
    if args.save:
        check_file('--save', args.save)
    network = _network(args)
    if args.save:
        import torch

        content = io.BytesIO()
        torch.save(dict(state_dict=network.algorithm.state_dict()), content)
        write_atomically(args.save, content.getvalue())
    from mmauxq.deploy.onnx import latency, runtime

    models = latency.forms_of(network)
    if args.openvino:  # before anything is timed
        latency.openvino_runner(models['float'], 1)
    shape = network.algorithm.cost.shape
    print(
        f'{runtime.cpu_name()} ({", ".join(runtime.cpu_features())}); '
        f'load {os.getloadavg()[0]:.1f}; images of (C, H, W) = {shape}'
    )
    kernels = {n: len(runtime.operators(m)[1]) for n, m in models.items()}
    head = ['runtime', 'batch', 'threads', 'form', 'integer', 'ms', 'speed-up']
    print(table(head, align='lrrlrrr'), end='')
    kinds = {'onnxruntime': latency.onnxruntime_runner}
    if args.openvino:
        kinds['openvino'] = latency.openvino_runner
    for kind, batch, threads in product(kinds, args.batch, args.threads):
        runners = _runners(kind, kinds[kind], models, threads)
        seconds = latency.latencies(runners, (batch, *shape), args.rounds)
        for name, value in seconds.items():
            number = kernels[name] if kind == 'onnxruntime' else ''
            cells = [kind, batch, threads, name, number, f'{1e3 * value:.2f}']
            speed_up = f'{seconds["float"] / value:.2f}'
            print(table_row([*cells, speed_up]), flush=True)


def _network(args: argparse.Namespace) -> Any:
    if args.checkpoint is not None:
        return load(args)
    cfg = load_config(args)
    compat.enable()
    from mmengine.registry import init_default_scope

    from mmauxq.deploy.network import check_config
    from mmauxq.deploy.onnx import latency
    from mmauxq.engine.image_shape import set_image_shape

    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    check_config(cfg)
    set_image_shape(cfg, 'val')
    return latency.calibrated_network(cfg)


def _runners(
    kind: str, make: Callable, models: dict[str, Any], threads: int
) -> dict[str, Callable]:
    """The forms that the runtime takes; the others are named on stderr."""
    runners = {}
    for name, model in models.items():
        try:
            runners[name] = make(model, threads)
        except UsageError as error:
            if name == 'float':
                raise
            print(f'{kind}, {name}: {error}', file=sys.stderr)
    return runners
