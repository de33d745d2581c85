"""Figures of a comparison."""

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use('Agg')  # works without a screen

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402
from matplotlib.transforms import ScaledTranslation  # noqa: E402

from mmauxq.files import write_atomically  # noqa: E402

from .comparison import by_arm, steps_count  # noqa: E402
from .meta_comparison import Effect, Overall  # noqa: E402
from .records import metric  # noqa: E402
from .statistics import PairedDifference  # noqa: E402

# Okabe and Ito's colours, told apart by all common forms of sight
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00')

MARKERS = 'osD^v'
TICKS = (-30, -10, -3, -1, 0, 1, 3, 10, 30)
"""Points, on an axis that is even from -1 to 1 and logarithmic beyond."""
FAR = 5
"""Points of loss from which their axis is such a one."""


def plot_accuracy(
    axes: Axes,
    curves: Mapping[str, np.ndarray],
    colours: Sequence[str] = COLOURS,
    metric: str = 'top-1',
) -> None:
    """Accuracy over epochs: mean line, band from the least to the best seed.

    Args:
        axes: To draw on.
        curves: Label -> (seeds, epochs), percent.
        colours: One for each label; they begin again at the end.
        metric: What is drawn.
    """
    for colour, (label, runs) in coloured(curves, colours):
        epochs = np.arange(1, runs.shape[1] + 1)
        axes.plot(epochs, runs.mean(0), color=colour, label=label)
        band = dict(color=colour, alpha=0.15, linewidth=0)
        axes.fill_between(epochs, runs.min(0), runs.max(0), **band)
    axes.set(xlabel='epoch', ylabel=f'{metric} (%)')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8, loc='lower right')


def plot_gradients(
    axes: Axes, norms: Mapping[str, Mapping[str, float]]
) -> None:
    """Gradient norms at the output of each block: label -> block -> norm."""
    for colour, (label, blocks) in coloured(norms):
        axes.plot(list(blocks.values()), 'o-', color=colour, label=label)
    blocks = next(iter(norms.values()))
    names = [name.removeprefix('backbone.') for name in blocks]
    style = dict(rotation=60, ha='right', fontsize=8)
    axes.set_xticks(range(len(names)), names, **style)
    axes.set_yscale('log')
    axes.set(ylabel='norm of the gradient', xlabel='block (input to output)')
    axes.legend(frameon=False, fontsize=8)


def plot_comparison(folder: Path, records: Sequence[Mapping]) -> None:
    """Accuracy over epochs, final accuracy against the time of a step, and
    the norm of the gradient of all losses at each block.

    Args:
        folder: ``accuracy.png`` is written there, ``cost.png`` if the times
            of steps can be compared, and ``gradients.png`` if no arm is a
            float network.
        records: Result of :func:`mmauxq.compare.comparison.collect`.
    """
    arms = {
        name: list(runs.values()) for name, runs in by_arm(records).items()
    }
    curves = {
        name: np.array([run['accuracy'] for run in runs])
        for name, runs in arms.items()
    }
    with _sheet(folder / 'accuracy.png') as axes:
        plot_accuracy(axes, curves, metric=metric(records))
    cost = folder / 'cost.png'
    if steps_count(records):
        _plot_cost(cost, arms, metric(records))
    else:  # it would be of other runs
        cost.unlink(missing_ok=True)
    norms = {name: _mean_norms(runs) for name, runs in arms.items()}
    if all(norms.values()):
        with _sheet(folder / 'gradients.png') as axes:
            plot_gradients(axes, norms)


def _plot_cost(
    path: Path, arms: Mapping[str, Sequence[Mapping]], metric: str
) -> None:
    """Final accuracy against the time of a step: arm -> records."""
    outline = [withStroke(linewidth=3, foreground='white')]
    with _sheet(path) as axes:
        for colour, (name, runs) in coloured(arms):
            finals = [run['final'] for run in runs]
            step = 1e3 * np.median([run['step_seconds'] for run in runs])
            plot_mean(axes, step, finals, fmt='o', capsize=3, color=colour)
            axes.annotate(
                name, (step, np.mean(finals)), xytext=(6, 4), fontsize=8,
                textcoords='offset points', color=colour, zorder=10,
                path_effects=outline,
            )  # fmt: skip
        axes.set(
            xlabel='training step (ms)',
            ylabel=f'final {metric} (%), mean and standard deviation',
        )


def plot_effects(path: Path, effects: Sequence[Effect | Overall]) -> None:
    """Differences to the reference with their 95% intervals, by setting.

    Blue above the reference, red below it, grey where the interval contains 0,
    and hollow where there is none: one seed.

    Args:
        path: File to write.
        effects: Results of :func:`mmauxq.compare.meta_comparison.effects` and
            :func:`mmauxq.compare.meta_comparison.together`.
    """
    settings: dict[str, list[Effect | Overall]] = {}
    for effect in effects:
        settings.setdefault(effect.setting, []).append(effect)
    labels: list[str] = []
    headings = []
    rows = len(effects) + len(settings)
    with _sheet(path, (7, 0.8 + 0.19 * rows)) as axes:
        for setting, inside in settings.items():
            headings.append(len(labels))
            axes.axhline(len(labels), color='#dddddd', linewidth=0.8, zorder=0)
            level = np.mean(inside[0].reference)
            labels.append(f'{setting} ({level:.1f}%)')
            for effect in inside:
                mean = effect.difference.mean
                width = effect.difference.half_width
                colour = '#888888'
                if width < abs(mean):
                    colour = COLOURS[1 if mean > 0 else 2]
                style = dict(xerr=width, capsize=2, markerfacecolor=colour)
                if not np.isfinite(width):
                    style = dict(xerr=0, capsize=0, markerfacecolor='white')
                style |= dict(fmt='o', markersize=4, color=colour)
                axes.errorbar(mean, len(labels), **style)
                labels.append(effect.arm)
        axes.axvline(0, color='black', linewidth=0.8, zorder=0)
        axes.set_yticks(range(rows), labels, fontsize=8)
        for row in headings:
            axes.get_yticklabels()[row].set_fontweight('bold')
        axes.set_ylim(rows - 0.5, -0.7)
        of = f'final {effects[0].metric} - that of the reference'
        axes.set(xlabel=f'{of} (points), 95%')


def plot_gain(path: Path, effects: Sequence[Effect]) -> None:
    """What each arm gains over the reference, against what the reference
    loses to the float network that it started from, with 95% intervals.

    A point for each setting and arm; hollow where there is no interval: one
    seed. Arms of a setting stand side by side.

    Args:
        path: File to write; removed where no loss is known.
        effects: Result of :func:`mmauxq.compare.meta_comparison.effects`.
    """
    arms: dict[str, list[tuple[PairedDifference, PairedDifference]]] = {}
    for effect in effects:
        if effect.loss is not None:
            pair = effect.loss, effect.difference
            arms.setdefault(effect.arm, []).append(pair)
    if not arms:  # it would be of other settings
        path.unlink(missing_ok=True)
        return
    of = effects[0].metric
    with _sheet(path) as axes:
        axes.axhline(0, color='black', linewidth=0.8, zorder=0)
        for i, (colour, (arm, pairs)) in enumerate(coloured(arms)):
            aside = 4 * (i - (len(arms) - 1) / 2) / 72  # inches
            moved = ScaledTranslation(aside, 0, axes.figure.dpi_scale_trans)
            style = dict(fmt=MARKERS[i % len(MARKERS)], markersize=5)
            style |= dict(color=colour, elinewidth=1, capsize=2)
            for place in pairs:
                across, up = (
                    each.half_width if each.pairs > 1 else 0 for each in place
                )
                x, y = (each.mean for each in place)
                axes.errorbar(
                    x, y, up, across, transform=axes.transData + moved,
                    markerfacecolor=colour if place[1].pairs > 1 else 'white',
                    label=arm, **style,
                )  # fmt: skip
                # what is moved does not count by itself
                ends = (x - across, y - up), (x + across, y + up)
                axes.update_datalim(ends)
        axes.autoscale_view()
        least, most = axes.dataLim.intervalx
        if most > FAR:
            spread_points(axes, min(-0.1, least), most)
        axes.set(
            xlabel=f'{of} that the reference loses to float (points), 95%',
            ylabel=f'{of} gained over the reference (points), 95%',
        )
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        style = dict(frameon=False, fontsize=8, loc='upper left')
        axes.legend(once.values(), once, **style)


def spread_points(axes: Axes, least: float, most: float) -> None:
    """Points in x, even from -1 to 1 and logarithmic beyond."""
    axes.set_xscale('symlog', linthresh=1)
    axes.set_xlim(1.5 * least, 1.5 * most)
    places = [x for x in TICKS if least <= x <= most]
    axes.set_xticks(places, map(str, places))
    axes.minorticks_off()


def coloured(items: Mapping, colours: Sequence[str] = COLOURS) -> Iterator:
    """(colour, (name, value)) of each item."""
    return zip(itertools.cycle(colours), items.items(), strict=False)


def plot_mean(
    axes: Axes, place: float, values: Sequence[float], **style: object
) -> None:
    """The mean, with the standard deviation as a bar."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0
    axes.errorbar(place, np.mean(values), deviation, **style)


def _mean_norms(runs: Sequence[Mapping]) -> dict[str, float]:
    """Geometric mean over runs of the norm at each block, all losses."""
    losses = [run['gradients'] for run in runs if run['gradients']]
    norms = [norms.get('joint', norms['student']) for norms in losses]
    return {
        block: float(stats.gmean([norm[block] for norm in norms]))
        for block in (norms[0] if norms else ())
    }


@contextmanager
def _sheet(path: Path, size: tuple[float, float] = (6, 4)) -> Iterator[Axes]:
    """Axes to draw on; the figure is written to ``path`` afterwards."""
    figure, axes = plt.subplots(figsize=size, layout='constrained')
    yield axes
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, and close it."""
    for axes in figure.axes:
        axes.spines[['top', 'right']].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, dpi=150)
    plt.close(figure)
    write_atomically(path, content.getvalue())
