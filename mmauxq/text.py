"""Numbers and tables as text."""

from collections.abc import Iterable, Sequence


def percent(fraction: float | None) -> str:
    """A fraction of 1 in percent; ``'unknown'`` for ``None``."""
    return 'unknown' if fraction is None else f'{fraction:.2%}'


def table_row(cells: Iterable[object]) -> str:
    """A row of a Markdown table, without a line break."""
    return f'| {" | ".join(map(str, cells))} |'


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[object]] = (),
    align: str = '',
) -> str:
    """A Markdown table, with a line break at its end.

    Args:
        head: Titles of the columns.
        rows: The cells of each row.
        align: ``l`` or ``r`` for each column; ``l`` where it is left out.
    """
    sides = align.ljust(len(head))
    rule = ['---:' if side == 'r' else '---' for side in sides]
    return ''.join(f'{table_row(row)}\n' for row in (head, rule, *rows))
