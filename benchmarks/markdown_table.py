"""Tables in Markdown."""

from collections.abc import Sequence


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], rule: str = ''
) -> str:
    """A table, without a line break at its end.

    Args:
        head: Names of the columns.
        rows: Cells of each row.
        rule: The line below the head, such as ``'|---|--:|'``; by default one
            that leaves the alignment of columns open.
    """
    head_line, *lines = [f'| {" | ".join(row)} |' for row in (head, *rows)]
    rule = rule or f'| {" | ".join(["---"] * len(head))} |'
    return '\n'.join([head_line, rule, *lines])
