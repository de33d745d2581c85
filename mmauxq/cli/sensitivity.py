"""Measure what the validation loses when each layer alone goes to fewer bits,
and propose bits for all of them. Nothing is trained. CONFIG says which
quantizers; with a float CHECKPOINT all other layers are float, with a
quantized one they are as they were trained."""

import argparse
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmauxq.errors import UsageError
from mmauxq.optional import need
from mmauxq.version import __version__

from .export import load
from .parser import add_config_arguments, integer

if TYPE_CHECKING:
    from torch import Tensor

    from mmauxq.analysis.allocation import Proposal
    from mmauxq.analysis.sensitivity import Sensitivity, Validation
    from mmauxq.deploy.network import Network

POLICY = 'policy.py'
FILES = ('sensitivity.md', 'sensitivity.png', POLICY, 'sensitivity.json')
CALIBRATION = 256
"""Training images that scales are calibrated with."""
UNITS = {'': 1, 'KiB': 2**10, 'MiB': 2**20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument('checkpoint', help='float, training or slim one')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder')
    parser.add_argument(
        '--bits', type=_bits, nargs='+', default=[8, 4, 3, 2], metavar='N',
        help='bits of weights and inputs to try (default: 8 4 3 2)',
    )  # fmt: skip
    parser.add_argument(
        '--images', type=integer(1), default=1000, metavar='N',
        help='validation images to measure on (default: 1000)',
    )  # fmt: skip
    parser.add_argument(
        '--metric', metavar='NAME',
        help='of val_evaluator, in percent (default: accuracy/top1)',
    )  # fmt: skip
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        '--max-drop', type=_points, metavar='X',
        help='propose bits with which at most X points of the metric are '
        'lost, as predicted and as measured',
    )  # fmt: skip
    budget.add_argument(
        '--size', type=_size, metavar='Y',
        help='propose bits for which weights take at most Y bytes; '
        '64KiB and 1.5MiB are understood, too',
    )  # fmt: skip


def _bits(text: str) -> int:
    if text not in map(str, range(2, 9)):
        raise argparse.ArgumentTypeError(
            f'expected integers from 2 to 8, got {text!r}'
        )
    return int(text)


def _points(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(
            f'expected a number from 0 to 100, got {text!r}'
        )
    return value


def _size(text: str) -> int:
    match = re.fullmatch(r'(\d+(?:\.\d+)?)(|KiB|MiB)', text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f'expected bytes such as 20000, 64KiB or 1.5MiB, got {text!r}'
        )
    return int(float(match[1]) * UNITS[match[2]])


def run(args: argparse.Namespace, mark_running: Callable) -> None:
    """Print the tables, and write them, the figure and the policy."""
    need('matplotlib', 'rich', 'scipy')
    from mmauxq.deploy.folder import check_folder
    from mmauxq.files import write_atomically, written_together

    out = check_folder(args.out, FILES, 'analysis')
    network = load(args, every_layer=True)
    from mmauxq.analysis import sensitivity_report as report
    from mmauxq.compare.sensitivity_figure import plot_sensitivity

    with written_together(out, FILES[-1]) as part:
        found, proposals = _measure(args, network, mark_running)
        page = report.as_markdown(found, proposals)
        write_atomically(part / 'sensitivity.md', page.encode())
        *_, last = [None, *proposals.values()]
        plot_sensitivity(part / 'sensitivity.png', found, last)
        if last is not None:
            policy = report.as_policy(found, last, _base(args, out))
            write_atomically(part / POLICY, policy.encode())
        content = dict(
            mmauxq_version=__version__,
            config=args.config,
            checkpoint=args.checkpoint,
            **report.as_json(found, proposals),
        )
        text = json.dumps(content, indent=1) + '\n'
        write_atomically(part / FILES[-1], text.encode())
    if last is None:  # it would be of another run
        (out / POLICY).unlink(missing_ok=True)
    print(page, end='')
    print(f'written: {out}')


def _measure(
    args: argparse.Namespace, network: 'Network', mark_running: Callable
) -> 'tuple[Sensitivity, dict[str, Proposal]]':
    """What each layer loses; and how a proposal was found -> it."""
    from rich.console import Console
    from rich.progress import Progress

    from mmauxq.analysis import allocation
    from mmauxq.analysis import sensitivity as analysis
    from mmauxq.compare.records import check_metric

    quantizers = network.cfg.model.quantizers
    widths = network.algorithm.bits
    names = [name for name, width in widths.items() if not width.is_float]
    images = _calibration_images(network)
    base = analysis.as_they_are(network.architecture, names, images[:1])
    bits = sorted(set(args.bits), reverse=True)
    if args.size is not None:
        least = analysis.width_at(quantizers, bits[-1])
        needed = sum(replace(c, width=least).size for c in base.values())
        if args.size < needed:
            raise UsageError(
                f'--size: expected at least the {needed:,} bytes that all '
                f'weights take at {least.weight} bits, got {args.size:,}'
            )
    validation = _validation(args, network)
    check_metric(validation.metric, validation.metrics)
    mark_running()
    measure = partial(analysis.loss_at, validation, quantizers, images)

    def together(chosen: 'allocation.Allocation') -> 'allocation.Loss':
        return measure(
            {
                name: choice.width
                for name, choice in chosen.items()
                if choice.width != base[name].width
            }
        )

    layers = {name: [choice] for name, choice in base.items()}
    proposals = {}
    with Progress(console=Console(stderr=True)) as bars:
        task = bars.add_task('', total=len(layers) * len(bits))
        for name, choice in analysis.sensitivities(
            base, bits, quantizers, measure
        ):
            layers[name].append(choice)
            bars.update(task, advance=1, description=name)
        bars.add_task('all layers at once', total=None)
        path = allocation.allocations(layers)
        if args.size is not None:
            found = allocation.within_size(path, args.size, together)
            proposals[f'at most {args.size:,} bytes'] = found
        if args.max_drop is not None:
            first, last = allocation.within_drop(path, args.max_drop, together)
            at_most = f'at most {args.max_drop:g} points'
            proposals[f'{at_most}, as predicted'] = first
            proposals[f'{at_most}, as measured'] = last
    metric = validation.metric
    result = analysis.Sensitivity(
        metric=metric,
        value=validation.metrics[metric],
        images=validation.images,
        layers=layers,
        float_layers={n: w.reason for n, w in widths.items() if w.is_float},
    )
    return result, proposals


def _validation(args: argparse.Namespace, network: 'Network') -> 'Validation':
    from mmengine.evaluator import Evaluator

    from mmauxq.analysis.sensitivity import Validation
    from mmauxq.compare.records import TOP1
    from mmauxq.deploy.network import first

    evaluator = network.cfg.get('val_evaluator')
    if evaluator is None:
        raise UsageError(f'{args.config} has no `val_evaluator`')
    if isinstance(evaluator, dict):
        evaluator = evaluator.get('metrics', evaluator)
    return Validation(
        network.architecture,
        list(first(network.samples(), args.images)),
        Evaluator(evaluator),
        args.metric or TOP1,
        network.multi_label,
    )


def _calibration_images(network: 'Network') -> 'Tensor':
    """The first images of the training data, the same in each run."""
    import torch
    from mmengine.runner import set_random_seed

    from mmauxq.deploy.network import first
    from mmauxq.network import forked_generators

    with forked_generators(network.algorithm):
        set_random_seed(0)
        batches = first(network.samples('train'), CALIBRATION)
        return torch.cat([images for images, _ in batches])


def _base(args: argparse.Namespace, out: Path) -> str | None:
    """What the policy inherits; new-style configs are inherited otherwise."""
    from mmengine.config import Config

    if Config._is_lazy_import(args.config):
        return None
    return os.path.relpath(args.config, out)
