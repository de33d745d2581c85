"""Use each part that MMPretrain and MMEngine register with a JointQAT.

    python -m benchmarks.coverage.parts --out work_dirs/parts
    python -m benchmarks.coverage.parts 'HOOKS/*' 'tools/test.py*'

Writes OUT.md, OUT.jsonl and the folder OUT, in which each part has a config,
what was printed and what was trained. The exit status is 0 if each row is as
the table of parts expects, 1 if one is not.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from mmauxq.cli.run_command import run_command
from mmauxq.optional import need


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``python -m benchmarks.coverage.parts``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    # fmt: off
    add = parser.add_argument
    add('names', nargs='*', metavar='NAME',
        help='names of parts, or patterns of them such as "METRICS/*"; by '
        'default all')
    add('--list', action='store_true', help='show the names')
    add('--out', type=Path, default='work_dirs/parts',
        help='where to save, without suffix: OUT.md, OUT.jsonl and OUT')
    add('--resume', action='store_true',
        help='keep the rows of OUT.jsonl that are as expected, and those of '
        'parts that are not named, and try the others')
    # fmt: on


def run(args: argparse.Namespace, started: Callable) -> int:
    """Try the parts, with a progress bar."""
    need('rich', 'cv2')
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from .part import Row, as_json_lines, as_markdown, from_json_lines
    from .plan import plan

    everything = plan()
    trials = plan(args.names)
    started()
    if args.list:
        print('\n'.join(trials))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    out = args.out.resolve()
    lines = out.with_suffix('.jsonl')
    old = lines.read_text() if args.resume and lines.is_file() else ''
    rows = {
        row.part: row
        for row in from_json_lines(old)
        if row.expected or row.part not in trials
    }
    lines.write_text(as_json_lines(list(rows.values())))
    columns = (
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        left = [name for name in trials if name not in rows]
        task = bar.add_task('parts', total=len(left))
        for name in left:
            bar.update(task, description=name)
            row: Row = trials[name](out)
            rows[name] = row
            # row by row, so that an interrupted sweep keeps what it has
            with lines.open('a') as file:
                file.write(as_json_lines([row]))
            bar.update(task, advance=1)
            if not row.expected:
                bar.console.print(f'{name}: {row.words}', markup=False)
    tried = [rows[name] for name in everything if name in rows]
    text = as_markdown(tried)
    out.with_suffix('.md').write_text(text)
    lines.write_text(as_json_lines(tried))
    print(text)
    return 0 if all(row.expected for row in tried) else 1


if __name__ == '__main__':
    sys.exit(
        run_command(
            sys.modules[__name__], prog='python -m benchmarks.coverage.parts'
        )
    )
