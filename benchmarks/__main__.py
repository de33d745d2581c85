"""Measure speed and memory: quantizers, steps, the runner, many GPUs, files.

    tools/benchmark.py --out DIR --minutes 20 --jobs 3
    tools/benchmark.py --out DIR --only 'step/r50/*/256' ops/activations
    tools/benchmark.py --out DIR --only 'scaling/*' --gpus 1 8 --repeats 40

Writes DIR/results.jsonl, table.md and steps.png. Run it again to measure what
is missing. On the CPU the figures mean nothing; --batch 2 --size 32
--repeats 1 shows that everything runs.
"""

import argparse
import sys
import time
from pathlib import Path

from mmauxq.errors import UsageError
from mmauxq.evaluation import benchmark, benchmark_report, benchmark_scaling


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if all measurements are there."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--out', type=Path, default='work_dirs/benchmark')
    parser.add_argument(
        '--only', nargs='+', default=[], metavar='PATTERN',
        help='names of measurements or shell patterns of them',
    )  # fmt: skip
    parser.add_argument('--list', action='store_true', help='show the names')
    parser.add_argument(
        '--minutes', type=float, help='stop after so many; run again to go on'
    )
    parser.add_argument(
        '--jobs', type=int, default=1,
        help='processes at a time; they take turns on the GPU',
    )  # fmt: skip
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument(
        '--batch', type=int, help='instead of the batch sizes in the names'
    )
    parser.add_argument('--size', type=int, default=224, help='of the images')
    parser.add_argument(
        '--gpus', type=int, nargs='+', metavar='N',
        help='of scaling/*; default: 1, 2, 4, ... and all that are there',
    )  # fmt: skip
    parser.add_argument(
        '--profile', type=int, default=3, metavar='STEPS',
        help='of scaling/*: steps in the profile; 0 for none',
    )  # fmt: skip
    parser.add_argument(
        '--again', action='store_true', help='also what is there already'
    )
    args = parser.parse_args(argv)
    try:
        names = benchmark.chosen(args.only)
        arms = [name for name in names if name.startswith('scaling/')]
        names = [name for name in names if name not in arms]
        names += benchmark_scaling.names(
            arms, args.gpus or benchmark_scaling.gpus_here()
        )
        for option in ('jobs', 'repeats', 'size'):
            if getattr(args, option) < 1:
                raise UsageError(
                    f'--{option} {getattr(args, option)}: allowed are '
                    'numbers from 1'
                )
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    if args.list:
        print('\n'.join(names))
        return 0
    if not args.again:
        ready = benchmark.done(args.out)
        names = [name for name in names if name not in ready]
    options = ['--repeats', str(args.repeats), '--size', str(args.size)]
    if args.batch:
        options += ['--batch', str(args.batch)]
    begin = time.monotonic()
    scaling = [name for name in names if name.startswith('scaling/')]
    failed = benchmark.run_all(
        [name for name in names if name not in scaling],
        args.out, options, args.jobs, args.minutes,
    )  # fmt: skip
    left = args.minutes
    if left:
        left -= (time.monotonic() - begin) / 60
    failed += benchmark_scaling.run_all(
        scaling, args.out, left, steps=args.repeats, batch=args.batch,
        size=args.size, profile=args.profile,
    )  # fmt: skip
    rows = benchmark.rows(args.out)
    benchmark_report.write(rows, args.out)
    print(f'{args.out / "table.md"}: {len(rows)} rows')
    missing = set(names) - benchmark.done(args.out)
    for name in sorted(missing):
        print(f'{name}: missing', file=sys.stderr)
    return 1 if failed or missing else 0


if __name__ == '__main__':
    sys.exit(main())
