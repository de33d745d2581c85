"""Measure each exported form of a network against its float export. Each form
has a process of its own, and they take turns. Without --checkpoint weights are
random and scales come from generated images: speed does not depend on them."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import TYPE_CHECKING, Any

from mmauxq import compat
from mmauxq.errors import UsageError
from mmauxq.files import check_file, write_atomically
from mmauxq.optional import need
from mmauxq.text import table, table_row

from .export import load
from .load_config import load_config
from .parser import add_config_arguments, integer

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmauxq.deploy.network import Network
    from mmauxq.deploy.onnx.latency import Latency

HEAD = [
    'runtime', 'batch', 'threads', 'form', 'integer', 'ms', 'speed-up',
    'busy cores',
]  # fmt: skip
QUIET = 0.3
"""Cores that other processes may keep busy."""


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
        '--rounds', type=integer(1), default=30, metavar='N',
        help='timed runs of each form (default: 30)',
    )  # fmt: skip
    parser.add_argument(
        '--openvino', action='store_true', help='OpenVINO, too'
    )
    parser.add_argument(
        '--save', metavar='FILE', help='keep the network as a checkpoint'
    )


def run(args: argparse.Namespace, mark_running: Callable) -> None:
    """Print a table of milliseconds."""
    need('onnx', 'onnxscript', 'onnxruntime', 'rich')
    if args.openvino:
        need('openvino')

    if args.save:
        check_file('--save', args.save)
    if args.checkpoint is not None:
        network = load(args)
    else:
        network = untrained(load_config(args))
    if args.save:
        import torch

        content = io.BytesIO()
        torch.save(dict(state_dict=network.algorithm.state_dict()), content)
        write_atomically(args.save, content.getvalue())
    from mmauxq.deploy.onnx import latency, runtime

    models = latency.forms_of(network)
    contents = {n: model.SerializeToString() for n, model in models.items()}
    kinds = ['onnxruntime', 'openvino'][: 1 + args.openvino]
    shape = network.algorithm.cost.shape
    mark_running()
    print(conditions(shape, args.rounds, kinds))
    kernels = {n: len(runtime.operators(m)[1]) for n, m in models.items()}
    print(table(HEAD, align='lrrlrrrr'), end='')
    busy = 0.0
    for kind, batch, threads in product(kinds, args.batch, args.threads):
        others = latency.busy_cores()
        busy = max(busy, others or 0.0)
        files = dict(contents)
        if kind == 'onnxruntime':
            files[latency.UNPACKED] = files['typed']
        found, refused = timed(
            kind, files, threads, (batch, *shape), args.rounds
        )
        for name, reason in refused.items():
            print(f'{kind}, {name}: {reason}', file=sys.stderr)
        for name, of in found.items():
            cells = [kind, batch, threads, name]
            cells += [kernels.get(name, 0) if kind == 'onnxruntime' else '']
            cells += [with_quartiles(of.seconds, 1e3)]
            cells += [with_quartiles(of.speed_up)]
            cells += ['' if others is None else f'{others:.1f}']
            print(table_row(cells), flush=True)
    warn_if_busy(busy)


def conditions(
    shape: Sequence[int], rounds: int, packages: Sequence[str]
) -> str:
    """On what is measured, images of (C, H, W) = ``shape``, how often, and
    with which versions of those packages that are installed."""
    from mmauxq.deploy.onnx import runtime

    versions = []
    for name in packages:
        with suppress(PackageNotFoundError):
            versions.append(f'{name} {version(name)}')
    return (
        f'{runtime.cpu_name()} ({", ".join(runtime.cpu_features())}), '
        f'{os.cpu_count()} cores; {", ".join(versions)}; '
        f'images of (C, H, W) = {tuple(shape)}; '
        f'{rounds} rounds: median and quartiles'
    )


def timed(
    kind: str,
    contents: Mapping[str, bytes],
    threads: int,
    shape: Sequence[int],
    rounds: int,
) -> tuple[dict[str, 'Latency'], dict[str, str]]:
    """Time forms against each other, with a progress bar on stderr.

    Args:
        kind: A runtime, as of :class:`.TimedForm`, like ``threads`` and
            ``shape``.
        contents: Form -> its file; the first is the float one.
        rounds: How often.

    Returns:
        Form -> its latency, and form -> why the runtime refuses it.

    Raises:
        UsageError: If the runtime refuses the float form.
    """
    from rich.console import Console
    from rich.progress import Progress

    from mmauxq.deploy.onnx.latency import UNPACKED, TimedForm, latencies

    forms: dict[str, Any] = {}
    refused = {}
    with ExitStack() as stack:
        for name, content in contents.items():
            try:
                runtime = 'unpacked' if name == UNPACKED else kind
                form = TimedForm(runtime, content, threads, shape)
            except UsageError as error:
                if not forms:
                    raise
                refused[name] = str(error)
                continue
            stack.callback(form.close)
            forms[name] = form
        bar = stack.enter_context(
            Progress(console=Console(stderr=True), transient=True)
        )
        task = bar.add_task(f'{kind}, {shape[0]}', total=rounds)
        return latencies(forms, rounds, lambda: bar.advance(task)), refused


def with_quartiles(values: Sequence[float], scale: float = 1.0) -> str:
    """The first quartile, the median and the third quartile as text."""
    low, middle, high = (scale * value for value in values)
    return f'{middle:.2f} ({low:.2f}-{high:.2f})'


def warn_if_busy(cores: float) -> None:
    """Say on stderr that figures are no evidence, if that is so."""
    if cores > QUIET:
        print(
            f'other processes kept {cores:.1f} cores busy, so that these '
            'figures are no evidence; measure again when nothing else runs',
            file=sys.stderr,
        )


def untrained(cfg: 'Config') -> 'Network':
    """The network of a config with random weights, and scales from generated
    images.

    Raises:
        UsageError: If the config trains no quantized network.
    """
    compat.enable()
    from mmauxq.deploy.network import calibrated_network, check_config
    from mmauxq.engine.image_shape import set_image_shape

    check_config(cfg)
    set_image_shape(cfg, 'val')
    return calibrated_network(cfg)
