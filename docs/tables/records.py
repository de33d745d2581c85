"""Records in ``docs/logs``, and their numbers as text."""

import json
from pathlib import Path

DOCS = Path(__file__).parents[1]
LOGS = DOCS / 'logs'
STEPS = 'benchmark_h200.jsonl'
"""Rows of steps and operations."""
QUARTER = 'tiny_quarter_teachers'
"""ResNet-18 at a quarter of its width, with a wide teacher and without."""


def rows(name: str, failed: bool = False) -> list[dict]:
    """Those of a file in ``docs/logs``; none if there is no such file.

    Args:
        name: Of the file.
        failed: Whether also those that have an error in place of a result.
    """
    file = LOGS / name
    if not file.exists():
        return []
    found = map(json.loads, file.read_text().splitlines())
    return [
        row for row in found if failed or not isinstance(row.get('error'), str)
    ]


def number(value: float | None, digits: int = 3) -> str:
    """With so many digits, never as a power of ten; nothing for nothing."""
    if value is None:
        return ''
    shown = float(f'{value:.{digits}g}')
    places = max(0, digits - len(f'{int(abs(shown))}'))
    if abs(shown) < 1:
        return f'{shown:.{digits}g}'
    return f'{shown:,.{places}f}'


def ratio(value: float | None, base: float | None) -> str:
    """One number over another; nothing where one of them is missing."""
    return f'{value / base:.2f}' if value and base else ''


def with_range(row: dict | None) -> str:
    """The time of a row, with its 10th and 90th percentile if it has any."""
    if row is None:
        return ''
    if 'low' not in row:
        return number(row['ms'])
    low, high = number(row['low']), number(row['high'])
    return f'{number(row["ms"])} ({low} to {high})'
