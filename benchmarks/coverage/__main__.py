"""Try the three lines of config on MMPretrain's image classifiers.

    python -m benchmarks.coverage 'lenet/*' 'deit/deit-tiny_*'
    python -m benchmarks.coverage --types --jobs 2 --out work_dirs/backbones

Writes OUT.md and OUT.jsonl. The exit status is 0 if all configs pass, 1 if
one does not.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from mmauxq.cli.parser import integer
from mmauxq.cli.run_command import run_command
from mmauxq.optional import need


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``python -m benchmarks.coverage``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        'configs',
        nargs='*',
        metavar='CONFIG',
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
    parser.add_argument(
        '--jobs', type=integer(1), default=1, metavar='N', help='processes'
    )
    parser.add_argument(
        '--timeout', type=float, default=600, help='seconds for one config'
    )
    parser.add_argument(
        '--memory', type=float, help='GiB of address space for one config'
    )
    parser.add_argument(
        '--out',
        type=Path,
        default='work_dirs/sweep',
        help='where to save, without suffix: OUT.md and OUT.jsonl',
    )
    parser.add_argument(
        '--resume',
        action='store_true',
        help='keep the rows of OUT.jsonl that pass, try the others',
    )


def run(args: argparse.Namespace, started: Callable) -> int:
    """Try the configs, with a progress bar."""
    need('rich')
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from .configs import classifier_configs
    from .row import Row, as_json_lines, as_markdown, from_json_lines
    from .sweep import smallest_of_each_type, sweep

    configs = classifier_configs(args.configs)
    limits = dict(
        timeout=args.timeout, memory=args.memory, jobs=args.jobs,
        quiet=not args.debug,
    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    started()
    lines = args.out.with_suffix('.jsonl')
    kept = {}
    if args.resume and lines.is_file():
        for row in from_json_lines(lines.read_text()):
            if row.verdict == 'pass':
                kept[row.config] = row
    lines.write_text(as_json_lines(list(kept.values())))
    columns = (
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        chosen = list(configs)
        if args.types:
            sizes = bar.add_task('sizes', total=len(chosen))
            chosen = smallest_of_each_type(
                configs,
                on_row=lambda row: bar.update(sizes, advance=1),
                **limits,
            )
        left = [config for config in chosen if config not in kept]
        task = bar.add_task('sweep', total=len(left))

        def show(row: Row) -> None:
            # row by row, so that an interrupted sweep keeps what it has
            with lines.open('a') as file:
                file.write(as_json_lines([row]))
            bar.update(task, advance=1)
            if row.verdict != 'pass':
                bar.console.print(
                    f'{row.config}: {row.verdict}, {row.reason}', markup=False
                )

        rows = sweep(left, on_row=show, build_only=args.build_only, **limits)
    new = {row.config: row for row in rows}
    rows = [kept.get(config) or new[config] for config in chosen]
    for row in rows:
        row.backbone = row.backbone or configs[row.config]
    text = as_markdown(rows)
    args.out.with_suffix('.md').write_text(text)
    lines.write_text(as_json_lines(rows))
    print(text)
    return 0 if all(row.verdict == 'pass' for row in rows) else 1


if __name__ == '__main__':
    sys.exit(
        run_command(
            sys.modules[__name__], prog='python -m benchmarks.coverage'
        )
    )
