"""The figure of a sensitivity analysis."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from mmauxq.analysis.allocation import Proposal
from mmauxq.analysis.sensitivity import Sensitivity
from mmauxq.analysis.sensitivity_report import label

from .figures import COLOURS, plt, save_figure, spread_points

FLOAT_COLOUR = '#d0d0d0'
LEAST = 1e-6
"""Divergence that is drawn at the edge, as all below it are."""


def plot_sensitivity(
    path: Path, found: Sensitivity, proposal: Proposal | None
) -> None:
    """What each layer loses at each width, and the bytes of its weights.

    Args:
        path: File to write.
        found: Of each layer, all widths.
        proposal: Drawn over the bytes, if there is one.
    """
    layers = list(found.layers.items())
    height = 1.6 + 0.22 * len(layers)
    figure, (drop, divergence, size) = plt.subplots(
        1,
        3,
        figsize=(11, height),
        sharey=True,
        width_ratios=(1.3, 1.3, 1),
        layout='constrained',
    )
    names = [name.removeprefix('backbone.') for name, _ in layers]
    drop.set_yticks(range(len(names)), names, fontsize=8)
    drop.set_ylim(len(names) - 0.5, -0.5)
    widths = [label(choice) for choice in layers[0][1][1:]]
    colours = dict(
        zip(widths, COLOURS[1:] + COLOURS[1:], strict=False),
        float=FLOAT_COLOUR,
    )
    drops = [[c.loss.drop for c in choices[1:]] for _, choices in layers]
    _dots(drop, drops, colours)
    drop.axvline(0, color='black', linewidth=0.8, zorder=0)
    least, most = min(-1, *map(min, drops)), max(1, *map(max, drops))
    spread_points(drop, least, most)
    drop.set_xlabel(f'loss of {found.metric} (points)')
    divergences = [
        [max(c.loss.divergence, LEAST) for c in choices[1:]]
        for _, choices in layers
    ]
    _dots(divergence, divergences, colours)
    divergence.set_xscale('log')
    divergence.minorticks_off()
    divergence.set_xlabel('divergence of the scores (nats)')
    sizes = [choices[0].size / 2**10 for _, choices in layers]
    size.barh(range(len(sizes)), sizes, 0.7, color=FLOAT_COLOUR)
    title = 'weights as they are'
    if proposal is not None:
        title = 'weights as they are, and as proposed'
        chosen = [proposal.allocation[name] for name, _ in layers]
        for row, choice in enumerate(chosen):
            colour = colours.get(label(choice), COLOURS[0])
            size.barh(row, choice.size / 2**10, 0.7, color=colour)
            place = max(choice.size / 2**10, sizes[row])
            size.annotate(
                label(choice), (place, row), xytext=(3, 0), fontsize=8,
                textcoords='offset points', va='center', color='#444444',
            )  # fmt: skip
        size.margins(x=0.12)
    size.set_xlabel('weights (KiB)')
    size.set_title(title, fontsize=9)
    for axes in (drop, divergence):
        axes.set_title('this layer alone at these bits', fontsize=9)
    for axes in (drop, divergence, size):
        axes.tick_params(axis='y', length=0)
        axes.grid(axis='x', color='#eeeeee', linewidth=0.8, zorder=0)
        axes.set_axisbelow(True)
    marks = [
        Line2D([], [], linestyle='', marker='o', color=colours[w])
        for w in widths
    ]
    bits = [f'{width} bits' if width.isdigit() else width for width in widths]
    figure.legend(
        marks, bits, loc='outside upper center', ncols=len(widths),
        frameon=False, fontsize=9,
    )  # fmt: skip
    save_figure(figure, path)


def _dots(
    axes: Axes, rows: list[list[float]], colours: dict[str, str]
) -> None:
    """A row for each layer, a dot for each width, the most bits on top."""
    for row, values in enumerate(rows):
        ends = min(values), max(values)
        axes.plot(ends, [row, row], color='#cccccc', linewidth=1, zorder=1)
        shown = list(zip(values, colours.values(), strict=False))
        for above, (value, colour) in enumerate(shown):
            axes.plot(value, row, 'o', color=colour, markersize=5,
                      zorder=10 - above)  # fmt: skip
