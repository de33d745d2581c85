"""Measure speed and memory: quantizers, steps, the runner, many GPUs, files.

    python -m benchmarks --out DIR --minutes 20 --jobs 3
    python -m benchmarks --out DIR --only 'step/r50/*/256' ops/activations
    python -m benchmarks --out DIR --only 'scaling/*' --gpus 1 8 --repeats 40

Writes DIR/results.jsonl, table.md and steps.png. The same command again
measures what is missing. On the CPU the figures mean nothing; --batch 2
--size 32 --repeats 1 shows that everything runs.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmauxq.cli.parser import integer
from mmauxq.cli.run_command import run_command
from mmauxq.optional import need


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``python -m benchmarks``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    # fmt: off
    add = parser.add_argument
    count = dict(type=integer(1), metavar='N')
    add('--out', type=Path, default='work_dirs/benchmark')
    add('--only', nargs='+', default=[], metavar='PATTERN',
        help='names of measurements or shell patterns of them')
    add('--list', action='store_true', help='show the names')
    add('--minutes', type=float, help='stop after so many; run again to go on')
    add('--jobs', **count, default=1,
        help='processes at a time; they take turns on the GPU')
    add('--repeats', **count, default=20,
        help='timed calls of each measurement (default: 20)')
    add('--batch', **count, help='instead of the batch sizes in the names')
    add('--size', **count, default=224,
        help='height and width of the images (default: 224)')
    add('--gpus', **count, nargs='+',
        help='of scaling/*; default: 1, 2, 4, ... and all of this machine')
    add('--profile', type=integer(), default=3, metavar='STEPS',
        help='of scaling/*: steps in the profile; 0 for none (default: 3)')
    add('--again', action='store_true', help='also what is measured already')
    # fmt: on


def run(args: argparse.Namespace, started: Callable) -> int:
    """Measure what is missing; 1 if something still is, or failed."""
    need('matplotlib', 'scipy')
    from . import names, processes, report, results, scaling

    chosen = names.chosen(args.only)
    arms = [name for name in chosen if name.startswith('scaling/')]
    wanted = [name for name in chosen if name not in arms]
    wanted += scaling.names(arms, args.gpus or scaling.gpus_here())
    if not args.list:
        names.check_decoders(wanted)
    started()
    if args.list:
        print('\n'.join(wanted))
        return 0
    if not args.again:
        ready = results.done(args.out)
        wanted = [name for name in wanted if name not in ready]
    runs = [name for name in wanted if name.startswith('scaling/')]
    begin = time.monotonic()
    failed = processes.run_all(
        [name for name in wanted if name not in runs],
        args.out, args.jobs, args.minutes,
        partial(processes.measure, out=args.out, repeats=args.repeats,
                batch=args.batch, size=args.size),
    )  # fmt: skip
    left = args.minutes
    if left:
        left -= (time.monotonic() - begin) / 60
    failed += processes.run_all(
        runs, args.out, 1, left,
        partial(scaling.measure, out=args.out, steps=args.repeats,
                batch=args.batch, size=args.size, profile=args.profile),
    )  # fmt: skip
    rows = results.read(args.out)
    report.write(rows, args.out)
    print(f'{args.out / "table.md"}: {len(rows)} rows')
    missing = set(wanted) - results.done(args.out)
    for name in sorted(missing):
        print(f'{name}: missing', file=sys.stderr)
    return 1 if failed or missing else 0


if __name__ == '__main__':
    sys.exit(run_command(sys.modules[__name__], prog='python -m benchmarks'))
