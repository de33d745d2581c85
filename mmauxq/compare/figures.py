"""Figures of a comparison."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats
from torch import Tensor

matplotlib.use('Agg')  # works without a screen

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patheffects import withStroke  # noqa: E402

from .comparison import by_arm  # noqa: E402
from .meta_comparison import Effect  # noqa: E402

# Okabe and Ito's colours, told apart by all common forms of sight
COLOURS = ('#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00')


def plot_accuracy(
    axes: Axes,
    curves: Mapping[str, np.ndarray],
    colours: Sequence[str] = COLOURS,
) -> None:
    """Accuracy over epochs: mean line, band from the least to the best seed.

    Args:
        axes: To draw on.
        curves: Label -> (seeds, epochs), percent.
        colours: Colours of the labels, in turn.
    """
    for colour, (label, runs) in _coloured(curves, colours):
        runs = np.atleast_2d(runs)
        epochs = np.arange(1, runs.shape[1] + 1)
        axes.plot(epochs, runs.mean(0), color=colour, label=label)
        if len(runs) > 1:
            axes.fill_between(
                epochs, runs.min(0), runs.max(0), color=colour, alpha=0.15,
                linewidth=0,
            )  # fmt: skip
    axes.set(xlabel='epoch', ylabel='top-1 (%)')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=8, loc='lower right')


def plot_gradients(
    axes: Axes,
    norms: Mapping[str, Mapping[str, float]],
    colours: Sequence[str] = COLOURS[1:],
) -> None:
    """Gradient norm at the output of each block.

    Args:
        axes: To draw on.
        norms: Label -> name of a block -> norm.
        colours: Colours of the labels, in turn.
    """
    for colour, (label, blocks) in _coloured(norms, colours):
        axes.plot(list(blocks.values()), 'o-', color=colour, label=label)
    names = [
        name.removeprefix('backbone.') for name in next(iter(norms.values()))
    ]
    axes.set_xticks(
        range(len(names)), names, rotation=60, ha='right', fontsize=8
    )
    axes.set_yscale('log')
    axes.set(ylabel='norm of the gradient', xlabel='block (input to output)')
    axes.legend(frameon=False, fontsize=8)


def plot_seeds(axes: Axes, finals: Mapping[str, Sequence[float]]) -> None:
    """Final accuracy of each run, those of one seed joined by a line.

    Args:
        axes: To draw on.
        finals: Label -> final top-1 of each seed, percent.
    """
    values = np.array(list(finals.values()))
    places = np.arange(len(values))
    axes.plot(places, values, color='#bbbbbb', linewidth=1, zorder=0)
    for place, (colour, runs) in enumerate(
        zip(itertools.cycle(COLOURS), values, strict=False)
    ):
        axes.plot([place] * len(runs), runs, 'o', color=colour, alpha=0.5)
        spread = runs.std(ddof=1) if len(runs) > 1 else 0
        axes.errorbar(
            place + 0.13, runs.mean(), spread, fmt='_', markersize=14,
            capsize=4, color=colour,
        )  # fmt: skip
    axes.set_xticks(
        places, [label.replace(' with', '\nwith') for label in finals]
    )
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set(ylabel='top-1 (%)')


def plot_rounding(
    axes: Axes, before: Tensor, after: Tensor, colour: str
) -> None:
    """The values of a tensor before and after its quantizer.

    Args:
        axes: To draw on.
        before: The input of the quantizer.
        after: Its output.
        colour: Colour of the levels.
    """
    values = before.flatten().numpy()
    low, high = np.quantile(values, [0.001, 0.999])
    levels, counts = after.flatten().unique(return_counts=True)
    levels = levels.numpy() + 0.0  # no -0
    share = 100 * (counts / counts.sum()).numpy()
    edges = np.linspace(min(low, levels[0]), max(high, levels[-1]), 41)
    axes.hist(
        values, edges, weights=np.full(len(values), 100 / len(values)),
        color='#bbbbbb', label='before: float',
    )  # fmt: skip
    axes.bar(
        levels, share, (edges[-1] - edges[0]) / 80, color=colour,
        label=f'after: {len(levels)} values',
    )  # fmt: skip
    for level, part in zip(levels, share, strict=True):
        axes.annotate(
            f'{level:.2g}', (level, part), xytext=(0, 2), ha='center',
            textcoords='offset points', fontsize=8, color=colour,
        )  # fmt: skip
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
        title: Title of the sheet.
        accuracy: Label -> (seeds, epochs), percent; the float network is the
            first, and drawn in the first panel as the level it ends at.
        where: The layer and the run that the tensors come from.
        tensors: Name -> (input of its quantizer, output), two of them.
    """
    figure = plt.figure(figsize=(12.5, 4.4), layout='constrained')
    grid = figure.add_gridspec(2, 3, width_ratios=(1.1, 1, 1.1))
    curves, seeds = (figure.add_subplot(grid[:, i]) for i in (0, 1))
    (label, start), *others = accuracy.items()
    plot_accuracy(curves, dict(others), COLOURS[1:])
    final = start[:, -1]
    curves.axhline(
        final.mean(), color=COLOURS[0], linestyle='--',
        label=f'{label}, where both begin',
    )  # fmt: skip
    curves.axhspan(
        final.min(), final.max(), color=COLOURS[0], alpha=0.1, linewidth=0
    )
    curves.legend(frameon=False, fontsize=9, loc='lower right')
    curves.margins(x=0.02)
    count = len(start)
    curves.set_title(
        'Each epoch: mean and range of seeds' if count > 1 else
        'Each epoch', fontsize=10,
    )  # fmt: skip
    plot_seeds(seeds, {name: runs[:, -1] for name, runs in accuracy.items()})
    seeds.set_title(
        'Last epoch: seeds, mean ± std. deviation' if count > 1
        else 'Last epoch', fontsize=10,
    )  # fmt: skip
    for row, (name, (before, after)) in enumerate(tensors.items()):
        axes = figure.add_subplot(grid[row, 2])
        plot_rounding(axes, before, after, COLOURS[2])
        axes.set_xlabel(name)
        if not row:
            axes.set_title(where, fontsize=10)
    figure.suptitle(title, fontsize=12)
    _save(figure, path)


def plot_comparison(folder: Path, records: Sequence[Mapping]) -> None:
    """Accuracy over epochs, final accuracy against the time of a step, and
    the norm of the gradient of all losses at each block.

    Args:
        folder: ``accuracy.png``, ``cost.png`` and, unless all runs are of
            float networks, ``gradients.png`` are written there.
        records: Result of :func:`mmauxq.compare.comparison.collect`.
    """
    arms = {
        name: list(runs.values()) for name, runs in by_arm(records).items()
    }
    with _sheet(folder / 'accuracy.png') as axes:
        plot_accuracy(
            axes,
            {
                name: np.array([run['accuracy'] for run in runs])
                for name, runs in arms.items()
            },
        )
    with _sheet(folder / 'cost.png') as axes:
        for colour, (name, runs) in _coloured(arms):
            finals = np.array([run['final'] for run in runs])
            step = 1e3 * np.median([run['step_seconds'] for run in runs])
            deviation = finals.std(ddof=1) if len(finals) > 1 else 0
            axes.errorbar(
                step, finals.mean(), deviation, fmt='o', capsize=3,
                color=colour,
            )  # fmt: skip
            axes.annotate(
                name, (step, finals.mean()), xytext=(6, 4), fontsize=8,
                textcoords='offset points', color=colour, zorder=10,
                path_effects=[withStroke(linewidth=3, foreground='white')],
            )  # fmt: skip
        axes.set(
            xlabel='training step (ms)',
            ylabel='final top-1 (%), mean and standard deviation',
        )
    norms = {name: _mean_norms(runs) for name, runs in arms.items()}
    if all(norms.values()):
        with _sheet(folder / 'gradients.png') as axes:
            plot_gradients(axes, norms, COLOURS)


def plot_effects(path: Path, effects: Sequence[Effect]) -> None:
    """Differences to the reference with their 95% intervals, by setting.

    Blue above the reference, red below it, grey where the interval contains 0,
    and hollow where there is none: one seed.

    Args:
        path: File to write.
        effects: Result of :func:`mmauxq.compare.meta_comparison.effects`.
    """
    settings: dict[str, list[Effect]] = {}
    for effect in effects:
        settings.setdefault(effect.setting, []).append(effect)
    rows = len(effects) + len(settings)
    place, labels, headings = 0, {}, []
    with _sheet(path, (7, 0.8 + 0.19 * rows)) as axes:
        for setting, inside in settings.items():
            axes.axhline(place, color='#dddddd', linewidth=0.8, zorder=0)
            level = np.mean(inside[0].reference)
            labels[place] = f'{setting} ({level:.1f}%)'
            headings.append(place)
            for effect in inside:
                place += 1
                labels[place] = effect.arm
                mean = effect.difference.mean
                width = effect.difference.half_width
                several = np.isfinite(width)
                colour = '#888888'
                if width < abs(mean):
                    colour = COLOURS[1 if mean > 0 else 2]
                axes.errorbar(
                    mean, place, xerr=width if several else 0, fmt='o',
                    markersize=4, capsize=2 if several else 0, color=colour,
                    markerfacecolor=colour if several else 'white',
                )  # fmt: skip
            place += 1
        axes.axvline(0, color='black', linewidth=0.8, zorder=0)
        axes.set_yticks(list(labels), list(labels.values()), fontsize=8)
        for at, label in zip(labels, axes.get_yticklabels(), strict=True):
            if at in headings:
                label.set_fontweight('bold')
        axes.set_ylim(place - 0.5, -0.7)
        axes.set(xlabel='final top-1 - that of the reference (points), 95%')


def _coloured(items: Mapping, colours: Sequence[str] = COLOURS) -> Iterator:
    """(colour, (name, value)) of each item; colours begin again at the end."""
    return zip(itertools.cycle(colours), items.items(), strict=False)


def _mean_norms(runs: Sequence[Mapping]) -> dict[str, float]:
    """Geometric mean over runs of the norm at each block, all losses."""
    gradients = [run['gradients'] for run in runs if run.get('gradients')]
    norms = [losses.get('joint', losses['student']) for losses in gradients]
    return {
        block: float(stats.gmean([norm[block] for norm in norms]))
        for block in (norms[0] if norms else ())
    }


@contextmanager
def _sheet(path: Path, size: tuple[float, float] = (6, 4)) -> Iterator[Axes]:
    """Axes to draw on; the figure is written to ``path`` afterwards."""
    figure, axes = plt.subplots(figsize=size, layout='constrained')
    yield axes
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
