"""Figures as SVG files that are the same each time they are drawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt


def save(draw: Callable[[], plt.Figure], script: str, **options: Any) -> None:
    """Save what ``draw`` returns beside its script.

    Args:
        draw: Draws the figure.
        script: Path of the script, whose name the file has.
        options: Of matplotlib's ``savefig``.
    """
    file = Path(script).with_suffix('.svg')
    # text as text, no date, and identifiers that depend on the name
    plt.rcParams.update({'svg.fonttype': 'none', 'svg.hashsalt': file.stem})
    plt.rcParams['font.family'] = 'DejaVu Sans'
    draw().savefig(file, metadata=dict(Date=None), **options)
