"""The sheet of the quick start."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from mmauxq.compare.figures import (
    COLOURS,
    coloured,
    plot_accuracy,
    plot_mean,
    plt,
    save_figure,
)


def plot_seeds(axes: Axes, finals: Mapping[str, Sequence[float]]) -> None:
    """Final top-1 of each seed, percent; those of one seed are joined."""
    places = np.arange(len(finals))
    joined = np.array(list(finals.values()))
    axes.plot(places, joined, color='#bbbbbb', linewidth=1, zorder=0)
    for place, (colour, (_, runs)) in zip(
        places, coloured(finals), strict=True
    ):
        axes.plot([place] * len(runs), runs, 'o', color=colour, alpha=0.5)
        style = dict(fmt='_', markersize=14, capsize=4, color=colour)
        plot_mean(axes, place + 0.13, runs, **style)
    labels = [label.replace(' with', '\nwith') for label in finals]
    axes.set_xticks(places, labels)
    axes.set_xlim(-0.4, len(finals) - 0.6)
    axes.set(ylabel='top-1 (%)')


def plot_rounding(axes: Axes, before: Tensor, after: Tensor) -> None:
    """The values of a tensor before and after its quantizer."""
    colour = COLOURS[2]
    values = before.flatten().numpy()
    low, high = np.quantile(values, [0.001, 0.999])
    levels, counts = after.flatten().unique(return_counts=True)
    levels = levels.numpy() + 0.0  # no -0
    share = 100 * (counts / counts.sum()).numpy()
    edges = np.linspace(min(low, levels[0]), max(high, levels[-1]), 41)
    weights = np.full(len(values), 100 / len(values))
    grey = dict(color='#bbbbbb', label='before: float')
    axes.hist(values, edges, weights=weights, **grey)
    label = f'after: {len(levels)} values'
    width = (edges[-1] - edges[0]) / 80
    axes.bar(levels, share, width, color=colour, label=label)
    above = dict(xytext=(0, 2), textcoords='offset points', ha='center')
    above |= dict(fontsize=8, color=colour)
    for level, part in zip(levels, share, strict=True):
        axes.annotate(f'{level:.2g}', (level, part), **above)
    axes.margins(y=0.15)
    axes.set(ylabel='values (%)')
    axes.legend(frameon=False, fontsize=8, loc='upper right')


def plot_quickstart(
    path: Path,
    title: str,
    accuracy: Mapping[str, np.ndarray],
    where: str,
    tensors: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """One sheet: accuracy over epochs and by seed, values before and after.

    Args:
        path: File to write.
        title: Of the sheet.
        accuracy: Label -> (seeds, epochs), percent; of the float network, the
            first one, the first panel has the last level alone.
        where: The layer and the run that the tensors come from.
        tensors: Name -> (input of its quantizer, output), two of them.
    """
    figure = plt.figure(figsize=(12.5, 4.4), layout='constrained')
    grid = figure.add_gridspec(2, 3, width_ratios=(1.1, 1, 1.1))
    curves, seeds = (figure.add_subplot(grid[:, i]) for i in (0, 1))
    (label, start), *others = accuracy.items()
    plot_accuracy(curves, dict(others), COLOURS[1:])
    final, colour = start[:, -1], COLOURS[0]
    label = f'{label}, where both begin'
    curves.axhline(final.mean(), color=colour, linestyle='--', label=label)
    band = dict(color=colour, alpha=0.1, linewidth=0)
    curves.axhspan(final.min(), final.max(), **band)
    curves.legend(frameon=False, fontsize=9, loc='lower right')
    curves.margins(x=0.02)
    plot_seeds(seeds, {name: runs[:, -1] for name, runs in accuracy.items()})
    several = len(start) > 1
    range_title = ': mean and range of seeds' * several
    curves.set_title(f'Each epoch{range_title}', fontsize=10)
    spread_title = ': seeds, mean ± std. deviation' * several
    seeds.set_title(f'Last epoch{spread_title}', fontsize=10)
    for row, (name, (before, after)) in enumerate(tensors.items()):
        axes = figure.add_subplot(grid[row, 2])
        plot_rounding(axes, before, after)
        axes.set_xlabel(name)
        if not row:
            axes.set_title(where, fontsize=10)
    figure.suptitle(title, fontsize=12)
    save_figure(figure, path)
