"""Blocks of the pages between ``<!-- table: NAME -->`` and ``<!-- end -->``.

A comment of this form is seen neither on the site nor on GitHub.
"""

import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from . import (
    coverage,
    experiments,
    export,
    map,
    operations,
    overview,
    ranks,
    scaling,
    sensitivity,
    speed,
)
from .records import DOCS

TABLES: dict[str, Callable[[], str]] = {
    **speed.TABLES,
    **operations.TABLES,
    **scaling.TABLES,
    **ranks.TABLES,
    **map.TABLES,
    **experiments.TABLES,
    **export.TABLES,
    **coverage.TABLES,
    **sensitivity.TABLES,
    **overview.TABLES,
}
"""Name -> the table."""
BLOCK = re.compile(
    r'^( *)<!-- table: (\S+) -->\n(.*?)^ *<!-- end -->$', re.M | re.S
)


def pages() -> list[Path]:
    """All that may have such blocks."""
    found = sorted(DOCS.glob('*.md')) + sorted(DOCS.glob('how_to/*.md'))
    return [DOCS.parent / 'README.md', *found]


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """Indentation, name and table of each block, as it stands in a page."""
    for match in BLOCK.finditer(text):
        yield match[1], match[2], match[3]


def made(indent: str, name: str) -> str:
    """A table from its records, as it stands in a page."""
    return textwrap.indent(TABLES[name](), indent)


def filled(text: str) -> str:
    """A page with its tables made anew."""

    def block(match: re.Match) -> str:
        indent, name, _ = match.groups()
        start, end = f'{indent}<!-- table: {name} -->', f'{indent}<!-- end -->'
        return f'{start}\n{made(indent, name)}{end}'

    return BLOCK.sub(block, text)


def stale(text: str) -> list[str]:
    """Names of the tables of a page that are not what their records give."""
    return [
        name
        for indent, name, shown in blocks(text)
        if shown != made(indent, name)
    ]
