"""Export a network in each form and at each width, run each file in its
runtimes, and print what loads, what runs, whether its codes are those of
PyTorch, and how fast it is beside float.

    python -m benchmarks.formats CONFIG --bits 8/8 4/4 2/2

Weights are random and scales come from generated images: speed does not depend
on them. What is refused is a row, too, and says why. Writes DIR/formats.jsonl
and DIR/formats.md. The same command again measures what is missing, and tries
again what was refused.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mmauxq.cli.latency import conditions, untrained, warn_if_busy
from mmauxq.cli.load_config import load_config
from mmauxq.cli.parser import add_config_arguments, integer
from mmauxq.cli.run_command import run_command
from mmauxq.deploy.network import check_config
from mmauxq.engine.config_validation import merge_options
from mmauxq.files import check_folder, write_atomically
from mmauxq.log import quiet_log
from mmauxq.optional import need
from mmauxq.quantizers.base import MOST_BITS, ROLES

from .. import results
from .forms import (
    FORMS,
    PACKAGES,
    TIMED,
    Row,
    arm,
    exported,
    time_rows,
)
from .page import as_markdown

if TYPE_CHECKING:
    from mmengine.config import Config

FILE = 'formats.jsonl'


def bits(text: str) -> str:
    """For argparse's ``type``: bits of weights and of activations."""
    most = [MOST_BITS[role] for role in ROLES]
    words = text.split('/')
    right = len(words) == 2 and all(
        word.isdecimal() and 1 <= int(word) <= limit
        for word, limit in zip(words, most, strict=True)
    )
    if not right:
        raise argparse.ArgumentTypeError(
            f'expected W/A such as 4/8, weights of 1 to {most[0]} bits and '
            f'activations of 1 to {most[1]}, got {text!r}'
        )
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``python -m benchmarks.formats``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_config_arguments(parser)
    # fmt: off
    add = parser.add_argument
    add('--bits', nargs='+', type=bits, required=True, metavar='W/A',
        help='bits of weights and of activations')
    add('--forms', nargs='+', choices=list(FORMS), default=list(FORMS),
        help='default: all of them')
    add('--rounds', type=integer(1), default=30, metavar='N',
        help='timed runs of each form (default: 30)')
    add('--images', type=integer(1), default=16, metavar='N',
        help='generated images to compare on (default: 16)')
    add('--out', type=Path, default='work_dirs/formats', metavar='DIR')
    add('--again', action='store_true', help='also what is measured already')
    # fmt: on


def run(args: argparse.Namespace, started: Callable) -> None:
    """Measure what is missing, and print the table."""
    need('rich')
    check_folder('--out', args.out)
    cfg = load_config(args)
    check_config(cfg)
    started()
    of = dict(
        config=args.config,
        options=args.cfg_options or {},
        rounds=args.rounds,
        images=args.images,
    )
    ready = set() if args.again else results.done(args.out, FILE, of)
    for text in args.bits:
        names = [
            name
            for name in args.forms
            if not {arm(text, name, r) for r in FORMS[name].runtimes} <= ready
        ]
        for row in _measured(cfg, text, names, args) if names else ():
            if row['arm'] not in ready:
                results.append(args.out, dict(of=of, **row), FILE)
    rows = {row['arm']: row for row in results.read(args.out, FILE, of)}
    arms = [
        arm(text, name, runtime)
        for text in args.bits
        for name in args.forms
        for runtime in FORMS[name].runtimes
    ]
    page = as_markdown([rows[name] for name in arms])
    write_atomically(args.out / 'formats.md', page.encode())
    print(page, end='')
    warn_if_busy(max(rows[name].get('busy') or 0.0 for name in arms))


def _measured(
    cfg: 'Config', text: str, names: list[str], args: argparse.Namespace
) -> list[Row]:
    """Rows of these forms for one width."""
    from rich.console import Console
    from rich.progress import Progress

    cfg = copy.deepcopy(cfg)
    settings = {
        f'model.quantizers.{role}.bits': int(number)
        for role, number in zip(ROLES, text.split('/'), strict=True)
    }
    merge_options(cfg, settings, '--bits')
    with (
        quiet_log(),
        tempfile.TemporaryDirectory() as folder,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task(f'{text}, files', total=len(names))
        network = untrained(cfg)
        rows, contents = exported(
            network, text, names, args.images, Path(folder),
            lambda: bar.advance(task),
        )  # fmt: skip
    time_rows(rows, contents, network, args.rounds)
    packages = [PACKAGES.get(name, name) for name in TIMED]
    where = conditions(network.algorithm.cost.shape, args.rounds, packages)
    return [dict(row, conditions=where) for row in rows]


if __name__ == '__main__':
    sys.exit(
        run_command(sys.modules[__name__], prog='python -m benchmarks.formats')
    )
