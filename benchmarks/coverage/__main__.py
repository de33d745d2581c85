"""Try the three lines of config on many networks: tools/sweep.py [CONFIG]."""

import argparse
import sys
from pathlib import Path

import mmauxq  # noqa: F401  (makes mmauxq:: bases known to the config)
from mmauxq.errors import UsageError


def main() -> int:
    """Run the sweep; 0 if all configs pass, 1 if one does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'configs',
        nargs='*',
        help="files, or patterns below MMPretrain's configs such as "
        '"resnet/*"; by default all image classifiers',
    )
    parser.add_argument(
        '--types',
        action='store_true',
        help='only the smallest config of each type of backbone',
    )
    parser.add_argument(
        '--build-only', action='store_true', help='build, do not train'
    )
    parser.add_argument('--jobs', type=int, default=1, help='processes')
    parser.add_argument(
        '--timeout', type=float, default=600, help='seconds for one config'
    )
    parser.add_argument(
        '--memory', type=float, help='GiB of address space for one config'
    )
    parser.add_argument(
        '--out',
        default='work_dirs/sweep',
        help='where to save, without suffix: OUT.md and OUT.jsonl',
    )
    parser.add_argument(
        '--resume',
        action='store_true',
        help='keep the rows of OUT.jsonl that pass, try the others',
    )
    args = parser.parse_args()
    try:
        return run(args)
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """The sweep, with a progress bar."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from mmauxq.evaluation import sweep
    from mmauxq.evaluation.mmpretrain_configs import classifier_configs

    configs = classifier_configs(args.configs)
    limits = dict(timeout=args.timeout, memory=args.memory, jobs=args.jobs)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines, table = out.with_suffix('.jsonl'), out.with_suffix('.md')
    kept = {}
    if args.resume and lines.is_file():
        for row in sweep.from_json_lines(lines.read_text()):
            if row.verdict == 'pass':
                kept[row.config] = row
    lines.write_text(sweep.as_json_lines(list(kept.values())))
    columns = (
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        chosen = list(configs)
        if args.types:
            sizes = bar.add_task('sizes', total=len(chosen))
            chosen = sweep.smallest_of_each_type(
                configs,
                on_row=lambda row: bar.update(sizes, advance=1),
                **limits,
            )
        left = [config for config in chosen if config not in kept]
        task = bar.add_task('sweep', total=len(left))

        def show(row: sweep.Row) -> None:
            # row by row, so that an interrupted sweep keeps what it has
            with lines.open('a') as file:
                file.write(sweep.as_json_lines([row]))
            bar.update(task, advance=1)
            if row.verdict != 'pass':
                bar.console.print(
                    f'{row.config}: {row.verdict}, {row.reason}', markup=False
                )

        rows = sweep.sweep(
            left, on_row=show, build_only=args.build_only, **limits
        )
    new = {row.config: row for row in rows}
    rows = [kept.get(config) or new[config] for config in chosen]
    for row in rows:
        row.backbone = row.backbone or configs[row.config]
    text = sweep.as_markdown(rows)
    table.write_text(text)
    lines.write_text(sweep.as_json_lines(rows))
    print(text)
    return 0 if all(row.verdict == 'pass' for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
