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
    # fmt: off
    add = parser.add_argument
    add('configs', nargs='*', metavar='CONFIG',
        help="files, or patterns below MMPretrain's configs such as "
        '"resnet/*"; by default all image classifiers')
    add('--types', action='store_true',
        help='only the smallest config of each type of backbone')
    add('--build-only', action='store_true', help='build, do not train')
    add('--jobs', type=integer(1), default=1, metavar='N', help='processes')
    add('--timeout', type=float, default=600, help='seconds for one config')
    add('--memory', type=float, help='GiB of address space for one config')
    add('--out', type=Path, default='work_dirs/sweep',
        help='where to save, without suffix: OUT.md and OUT.jsonl')
    add('--resume', action='store_true',
        help='keep the rows of OUT.jsonl that pass, try the others')
    # fmt: on


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
    old = lines.read_text() if args.resume and lines.is_file() else ''
    rows = {row.config: row for row in from_json_lines(old)}
    rows = {k: row for k, row in rows.items() if row.verdict == 'pass'}
    lines.write_text(as_json_lines(list(rows.values())))
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
        left = [config for config in chosen if config not in rows]
        task = bar.add_task('sweep', total=len(left))

        def show(row: Row) -> None:
            row.backbone = row.backbone or configs[row.config]
            rows[row.config] = row
            # row by row, so that an interrupted sweep keeps what it has
            with lines.open('a') as file:
                file.write(as_json_lines([row]))
            bar.update(task, advance=1)
            if row.verdict != 'pass':
                bar.console.print(
                    f'{row.config}: {row.verdict}, {row.reason}', markup=False
                )

        sweep(left, on_row=show, build_only=args.build_only, **limits)
    tried = [rows[config] for config in chosen]
    text = as_markdown(tried)
    args.out.with_suffix('.md').write_text(text)
    lines.write_text(as_json_lines(tried))
    print(text)
    return 0 if all(row.verdict == 'pass' for row in tried) else 1


if __name__ == '__main__':
    sys.exit(
        run_command(
            sys.modules[__name__], prog='python -m benchmarks.coverage'
        )
    )
