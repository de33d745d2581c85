"""Compare arms fairly: arms x seeds on one budget, resumable.

    mmauxq compare --out DIR --seeds 0 1 2 --jobs 2 \\
        --float configs/float_r20_digits.py \\
        --arms plain=configs/qat_r20_w2a2_digits.py \\
               aux=configs/aux_r20_w2a2_digits.py \\
               narrow=configs/aux_r20_w2a2_digits.py,\\
model.guidance.width_ratio=0.25

Trains the float network once for each seed, starts every arm from it, and
writes results.jsonl, table.md and figures into DIR. A teacher without a
checkpoint of its own is the float network that the arm starts from. Run it
again to go on after a kill, or with more seeds or arms. Runs are spread over
all GPUs. Steps are timed where runs have a GPU, or the CPU, to themselves, and
where all GPUs are of one kind; else their column is empty.

With --tune optim_wrapper.optimizer.lr=0.0005,0.001,0.002 each arm has its own
learning rate, chosen of these on training images that are held out. Any other
setting of a recipe can be tuned, too.

--table DIR only writes table and figures anew. --map DIR DIR ... --out OUT
puts what the arms do in several such folders into one table and one figure,
OUT/map.md and OUT/map.png; with --together also each arm over all of them.
OUT/gain.png has what each arm gains over what the reference loses to float.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmauxq.errors import UsageError
from mmauxq.files import check_folder, held_alone, write_atomically
from mmauxq.optional import need
from mmauxq.stopping import Stopped

from .parser import add_cfg_options, integer

FLOAT = 'float'
HOLD_OUT = 5000
TUNE_SEED = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        '--arms',
        nargs='+',
        default=[],
        metavar='NAME=CONFIG',
        help='what is compared: a name, a recipe and, after commas, settings '
        'KEY=VALUE of this arm',
    )
    parser.add_argument('--out', type=Path, help='folder of the comparison')
    parser.add_argument(
        '--seeds',
        type=int,
        nargs='+',
        default=[0, 1, 2],
        metavar='N',
        help='each arm is trained once for each of them (default: 0 1 2)',
    )
    parser.add_argument(
        '--jobs',
        type=integer(1),
        default=1,
        metavar='N',
        help='runs at a time: on each GPU, where memory allows, or on the CPU '
        '(default: 1)',
    )
    parser.add_argument(
        '--gpus',
        type=integer(0),
        metavar='N',
        help='GPUs to spread the runs over (default: all that are visible); '
        '0 for the CPU',
    )
    parser.add_argument(
        '--float',
        dest='start',
        metavar='CONFIG|CHECKPOINT',
        help='float recipe (trained for each seed; KEY=VALUE may follow it as '
        'an arm) or checkpoint to start from; without it, from scratch',
    )
    parser.add_argument(
        '--metric',
        metavar='NAME',
        help='what the validation gives in percent, the more the better '
        '(default: accuracy/top1)',
    )
    parser.add_argument(
        '--tune',
        metavar='KEY=V1,V2,...',
        help='a setting of which each arm takes its best value: before, it is '
        'trained with each, and validated on held-out training images',
    )
    parser.add_argument(
        '--hold-out',
        type=integer(1),
        metavar='N',
        help=f'training images held out for --tune (default: {HOLD_OUT})',
    )
    parser.add_argument(
        '--tune-seeds',
        type=integer(0),
        nargs='+',
        metavar='SEED',
        help='seeds of the runs of --tune, over which a value has its mean '
        f'(default: {TUNE_SEED})',
    )
    parser.add_argument('--reference', help='arm to compare with (the first)')
    parser.add_argument(
        '--table',
        type=Path,
        metavar='DIR',
        help='only write table and figures of this comparison anew',
    )
    parser.add_argument(
        '--map',
        type=Path,
        nargs='+',
        metavar='DIR',
        help='put these comparisons into one table and one figure in --out',
    )
    parser.add_argument(
        '--together',
        action='store_true',
        help='with --map, also each arm over all of them',
    )
    add_cfg_options(parser, 'override settings of all arms')


def run(args: argparse.Namespace, mark_running: Callable) -> int:
    """Train what is missing, and write table and figures."""
    if not (args.out and (args.arms or args.map)) and (
        args.table is None or args.map
    ):
        raise UsageError(
            'expected --arms and --out, or --map and --out, or --table'
        )
    if args.together and not args.map:
        raise UsageError('--together: expected beside --map DIR DIR ...')
    for option in ('hold_out', 'tune_seeds'):
        if getattr(args, option) is not None and args.tune is None:
            raise UsageError(
                f'--{option.replace("_", "-")}: expected beside --tune'
            )
    if args.tune is not None and not args.arms:
        raise UsageError('--tune: expected beside --arms')
    if args.out is not None:
        check_folder('--out', args.out)
    need('matplotlib', 'rich', 'scipy')
    if args.map is not None:
        _draw_map(args)
        return 0
    try:
        if args.table is None:
            _train(args)
    except Stopped as stopped:
        print(stopped.line('compare'), file=sys.stderr)
        return stopped.status
    from mmauxq.compare import comparison, tuning
    from mmauxq.compare.figures import plot_comparison
    from mmauxq.compare.records import metric

    out = args.table or args.out
    records = comparison.collect(out)
    reference = args.reference or records[0]['arm']
    if args.arms and not args.reference:
        reference = args.arms[0].partition('=')[0]
    terms = comparison.describe(out)
    parts = [
        comparison.table(records, reference),
        comparison.diverged(terms),
        tuning.table(terms, metric(records)),
    ]
    text = '\n'.join(filter(None, parts))
    write_atomically(out / 'table.md', text.encode())
    plot_comparison(out, records)
    print(text)
    return 0


def _watch(runs: list, what: str, *settings: Any) -> None:
    """Train, with a bar for all runs and one for each that is under way."""
    from rich.console import Console
    from rich.progress import Progress

    from mmauxq.compare import comparison

    with Progress(console=Console(stderr=True)) as bars:
        total = bars.add_task(what, total=len(runs))
        tasks: dict = {}
        for active in comparison.train(runs, *settings):
            done = sum(run.result.is_file() for run in runs)
            bars.update(total, completed=done)
            for run, where in active.items():
                if run not in tasks:
                    name = f'  {run.name}  {where}'.rstrip()
                    tasks[run] = bars.add_task(name)
                step, of = run.progress
                bars.update(tasks[run], completed=step, total=of or None)
            for run in tasks.keys() - active.keys():
                bars.remove_task(tasks.pop(run))
        bars.update(total, completed=len(runs))


def _train(args: argparse.Namespace) -> None:
    """Settle what is to be trained, and train what is missing of it."""
    from mmauxq.compare import arms
    from mmauxq.compare.placement import find_gpus
    from mmauxq.compare.records import TOP1, check_seeds
    from mmauxq.compare.tuning import read_tuning

    check_seeds(args.seeds)
    gpus, metric = find_gpus(args.gpus), args.metric or TOP1
    tuned = (args.tune or '').partition('=')[0]
    configs = arms.read_arms(args.arms, args.cfg_options, tuned)
    start, floats = args.start, {}
    if start is not None and start.partition(',')[0].endswith('.py'):
        floats = arms.read_arms([f'{FLOAT}={start}'])
        arms.check_arms(floats)
    arms.check_arms(configs)
    tuning = None
    if args.tune is not None:
        seeds = args.tune_seeds or [TUNE_SEED]
        check_seeds(seeds, '--tune-seeds')
        if both := [seed for seed in seeds if seed in args.seeds]:
            raise UsageError(
                f'--tune-seeds: expected none of --seeds, got {both[0]}'
            )
        images = HOLD_OUT if args.hold_out is None else args.hold_out
        tuning = read_tuning(args.tune, images, seeds, configs)
        tuning.check(configs, floats)
        given = arms.teachers(configs)
        if start is not None and not floats:
            given = {'--float': start, **given}
        for place, checkpoint in given.items():
            print(
                f'warning: {place}: {checkpoint} may have seen the images '
                'that are held out; the networks of a --float recipe have '
                'not',
                file=sys.stderr,
            )
    with held_alone('--out', args.out):
        _train_settled(args, gpus, metric, configs, floats, tuning)


def _train_settled(
    args: argparse.Namespace,
    gpus: Any,
    metric: str,
    configs: dict,
    floats: dict,
    tuning: Any,
) -> None:
    """The values to choose from, the float networks, then the arms."""
    from mmauxq.compare import arms, comparison
    from mmauxq.compare.tuning import hold_out

    def watch(
        runs: list, what: str, start: str | None, may_diverge: bool
    ) -> None:
        _watch(runs, what, args.jobs, start, gpus, metric, may_diverge)

    def starts(out: Path) -> str | None:
        """What the arms of a folder start from."""
        if not floats:
            return args.start
        return str(out / FLOAT / 'runs' / FLOAT / '{seed}/last.pth')

    comparison.begin(
        args.out,
        start=args.start,
        options=args.cfg_options or {},
        metric=metric,
        tuning=tuning and asdict(tuning),
        **arms.budget(configs, tuning.key if tuning else ''),
    )
    inside, found = args.out / 'tune', {}
    if floats:
        float_runs = comparison.plan(args.out / FLOAT, floats, args.seeds)
        if tuning is not None:
            less = {k: hold_out(c, tuning.hold_out) for k, c in floats.items()}
            float_runs += comparison.plan(inside / FLOAT, less, tuning.seeds)
        watch(float_runs, 'float networks', None, False)
    if tuning is not None:
        tried = tuning.plan(inside, configs)
        watch(tried, 'arms x values', starts(inside), True)
        metrics = tuning.metrics(inside, configs)
        chosen = tuning.choose(metrics)
        configs = tuning.with_values(configs, chosen)
        found = dict(held_out=metrics, chosen=chosen)
    runs = comparison.plan(args.out, configs, args.seeds, **found)
    watch(runs, 'arms x seeds', starts(args.out), True)
    comparison.note_diverged(args.out)


def _draw_map(args: argparse.Namespace) -> None:
    """Several comparisons in one table and one figure."""
    from mmauxq.compare import meta_comparison
    from mmauxq.compare.figures import plot_effects, plot_gain

    effects = meta_comparison.effects(args.map, args.reference)
    overall = meta_comparison.together(effects) if args.together else []
    text = meta_comparison.table(effects, overall)
    if missing := meta_comparison.without_start(effects):
        text += f'\n{missing}'
    write_atomically(args.out / 'map.md', text.encode())
    plot_effects(args.out / 'map.png', [*effects, *overall])
    plot_gain(args.out / 'gain.png', effects)
    print(text)
