"""Figures of a comparison."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from torch import Tensor

matplotlib.use('Agg')  # no screen is needed

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
        colours: Of the labels, in turn.
    """
    for colour, (label, runs) in zip(
        itertools.cycle(colours), curves.items(), strict=False
    ):
        runs = np.atleast_2d(runs)
        epochs = np.arange(1, runs.shape[1] + 1)
        axes.plot(epochs, runs.mean(0), color=colour, label=label)
        if len(runs) > 1:
            axes.fill_between(
                epochs,
                runs.min(0),
                runs.max(0),
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
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
        colours: Of the labels, in turn.
    """
    for colour, (label, blocks) in zip(
        itertools.cycle(colours), norms.items(), strict=False
    ):
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
        before: What the quantizer got.
        after: What it gave.
        colour: Of the levels.
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
        title: Of the sheet.
        accuracy: Label -> (seeds, epochs), percent; the float network is the
            first, and drawn in the first panel as the level it ends at.
        where: The layer and the run that the tensors come from.
        tensors: Name -> (what its quantizer got, what it gave), two of them.
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
        records: Of :func:`mmauxq.compare.comparison.collect`.
    """
    arms = {
        name: list(runs.values()) for name, runs in by_arm(records).items()
    }
    figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
    plot_accuracy(
        axes,
        {
            name: np.array([run['accuracy'] for run in runs])
            for name, runs in arms.items()
        },
    )
    _save(figure, folder / 'accuracy.png')
    figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
    for colour, (name, runs) in zip(
        itertools.cycle(COLOURS), arms.items(), strict=False
    ):
        finals = np.array([run['final'] for run in runs])
        step = 1e3 * np.median([run['step_seconds'] for run in runs])
        axes.errorbar(
            step,
            finals.mean(),
            finals.std(ddof=1) if len(finals) > 1 else 0,
            fmt='o',
            capsize=3,
            color=colour,
        )
        axes.annotate(
            name,
            (step, finals.mean()),
            xytext=(6, 4),
            textcoords='offset points',
            fontsize=8,
            color=colour,
            zorder=10,
            path_effects=[withStroke(linewidth=3, foreground='white')],
        )
    axes.set(
        xlabel='training step (ms)',
        ylabel='final top-1 (%), mean and standard deviation',
    )
    _save(figure, folder / 'cost.png')
    norms = {name: _mean_norms(runs) for name, runs in arms.items()}
    if all(norms.values()):
        figure, axes = plt.subplots(figsize=(6, 4), layout='constrained')
        plot_gradients(axes, norms, COLOURS)
        _save(figure, folder / 'gradients.png')


def plot_effects(path: Path, effects: Sequence[Effect]) -> None:
    """Differences to the reference with their 95% intervals, by setting.

    Blue above the reference, red below it, grey where the interval contains 0,
    and hollow where there is none: one seed.

    Args:
        path: File to write.
        effects: Of :func:`mmauxq.compare.meta_comparison.effects`.
    """
    settings = list(dict.fromkeys(effect.setting for effect in effects))
    rows = len(effects) + len(settings)
    figure, axes = plt.subplots(
        figsize=(7, 0.8 + 0.19 * rows), layout='constrained'
    )
    place, labels, headings = 0, {}, []
    for setting in settings:
        inside = [e for e in effects if e.setting == setting]
        axes.axhline(place, color='#dddddd', linewidth=0.8, zorder=0)
        level = np.mean(inside[0].reference)
        labels[place] = f'{setting} ({level:.1f}%)'
        headings.append(place)
        for effect in inside:
            place += 1
            difference = effect.difference
            mean, width = difference.mean, difference.half_width
            sure, one = width < abs(mean), not np.isfinite(width)
            colour = COLOURS[1 if mean > 0 else 2] if sure else '#888888'
            axes.errorbar(
                mean,
                place,
                xerr=0 if one else width,
                fmt='o',
                markersize=4,
                capsize=0 if one else 2,
                color=colour,
                markerfacecolor='white' if one else colour,
            )
            labels[place] = effect.arm
        place += 1
    axes.axvline(0, color='black', linewidth=0.8, zorder=0)
    axes.set_yticks(list(labels), list(labels.values()), fontsize=8)
    for at, text in zip(labels, axes.get_yticklabels(), strict=True):
        if at in headings:
            text.set_fontweight('bold')
    axes.set_ylim(place - 0.5, -0.7)
    axes.set(xlabel='final top-1 - that of the reference (points), 95%')
    _save(figure, path)


def _mean_norms(runs: Sequence[Mapping]) -> dict[str, float]:
    """Geometric mean over runs of the norm at each block, all losses."""
    found = [run['gradients'] for run in runs if run.get('gradients')]
    norms = [run.get('joint', run['student']) for run in found]
    if not norms:
        return {}
    return {
        block: float(np.exp(np.mean([np.log(n[block]) for n in norms])))
        for block in norms[0]
    }


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
