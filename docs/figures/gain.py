"""Draw gain.svg: what guidance gains over plain low-bit training.

python -m docs.figures.gain

One point is one setting: a network, its bits and quantizers, its data and its
budget. All of them start from a trained float network.
"""

from dataclasses import replace

from matplotlib import pyplot as plt

from mmauxq.compare.comparison import by_arm, by_seed, collect
from mmauxq.compare.figures import COLOURS, spread_points
from mmauxq.compare.meta_comparison import Effect, effects
from mmauxq.compare.statistics import PairedDifference

from ..tables.records import LOGS, QUARTER
from ..tables.runs import Arm, side
from .svg import save

FLOAT = {
    'digits_w2a2_strategies': 98.83,
    'fmnist_narrow_w2a2': 89.44,
    'map/fmnist_depth110': 94.46,
    'map/fmnist_depth56': 94.11,
    'map/fmnist_dorefa': 93.91,
    'map/fmnist_float': 93.91,
    'map/fmnist_narrow': 92.98,
    'map/fmnist_narrow_module': 92.98,
    'map/fmnist_narrow_w1a1': 92.98,
    'map/fmnist_narrow_w1a1_lr3e-3': 92.98,
    'map/fmnist_noskip': 94.18,
    'map/fmnist_pact': 93.91,
    'map/fmnist_two_stages': 94.08,
    'map/fmnist_w1a2': 93.91,
    'map/fmnist_w3a3': 93.91,
}
"""Records -> top-1 of the float network, which they do not say themselves."""
NEWER = {
    'tiny_quarter_tuned': 'plain',
    'tiny_quarter_w1a1': 'plain',
    'tiny_full': 'plain',
    'tiny_half': 'plain',
    'tiny_noskip': 'plain',
    'tiny_r50_quarter': 'plain',
    'tiny_recipes': 'plain',
    'digits_narrow_seeds': 'plain',
    'digits_teacher/20': 'plain',
    'digits_teacher/30': 'plain',
    'digits_w1a1': 'plain',
    'digits_w1a1_seeds': 'plain',
}
"""Records that say it, -> name of plain training there."""
PANELS = {
    'the auxiliary module': ('aux',),
    'a float teacher': ('kd4', 'kd'),
    'the module and a teacher': ('auxkd4', 'auxkd'),
}
"""Title -> names of the arm in the records, the first that is there."""
PAIRS = {
    'a float teacher': (
        (('tiny_rates', 'plain'), ('tiny_teachers', 'kdw4')),
        ((QUARTER, 'plain'), (QUARTER, 'kdw4')),
        ((QUARTER, 'w4'), (QUARTER, 'w4wide')),
    ),
    'the module and a teacher': (((QUARTER, 'plain'), (QUARTER, 'auxkdw4')),),
}
"""Title -> plain training and guidance, for a teacher that is wider than F."""
NAMED = {
    'fmnist_depth56': ('56 layers', (0, 8), 'center'),
    'fmnist_narrow_w1a1': ('W1A1', (6, 28), 'center'),
    'tiny_full': ('Tiny-ImageNet', (-8, 12), 'right'),
    'tiny_teachers/kdw4': ('twice as wide, Tiny-ImageNet', (-6, -8), 'right'),
    'tiny_quarter_teachers/w4wide': ('wide, W4A4', (4, 10), 'center'),
    'tiny_quarter_teachers/auxkdw4': ('wide, W2A2', (0, -22), 'center'),
    'tiny_quarter_w1a1': ('W1A1, Tiny-ImageNet', (18, -78), 'right'),
    'digits_narrow_seeds': ('narrow, digits', (-10, 26), 'right'),
    'digits_w1a1': ('W1A1, digits', (0, 48), 'center'),
    'digits_w1a1_seeds': ('W1A1, digits', (0, 48), 'center'),
}
"""Setting -> text at its point, where that stands, and its alignment."""

VERDICTS = {
    'above 0': COLOURS[1],
    'below 0': COLOURS[2],
    'contains 0': '#888888',
}


def verdict(found: PairedDifference) -> str:
    """Where its interval lies."""
    return {1: 'above 0', -1: 'below 0', 0: 'contains 0'}[side(found)]


def of_panel(arms: tuple[str, ...]) -> list[Effect]:
    """Each setting that has one of these arms, with its float network."""
    found = []
    for folder in FLOAT | NEWER:
        plain = NEWER.get(folder, 'plain')
        of = {e.arm: e for e in effects([LOGS / folder], plain)}
        arm = next((of[name] for name in arms if name in of), None)
        if arm:
            start = arm.start or (FLOAT[folder],) * len(arm.reference)
            found.append(replace(arm, start=start))
    return found


def of_pair(plain: Arm, guided: Arm) -> Effect:
    """Two arms whose runs began with the same float networks."""
    without, found = (
        by_arm(collect(LOGS / folder))[arm] for folder, arm in (plain, guided)
    )
    seeds = sorted(without)
    result, reference = by_seed('final', seeds, found, without)
    (start,) = by_seed('float_final', seeds, without)
    setting = '/'.join(guided)
    return Effect(setting, guided[1], result, reference, None, start=start)


def draw() -> plt.Figure:
    """The figure."""
    figure, panels = plt.subplots(
        3, figsize=(4.6, 8), sharex=True, sharey=True, layout='constrained'
    )
    figure.suptitle(
        'Does guidance gain more where\nlow bits lose more?', fontsize=13
    )
    for axes, (title, arms) in zip(panels, PANELS.items(), strict=True):
        axes.set_title(title, fontsize=11, loc='left')
        axes.axhline(0, color='black', linewidth=0.8)
        shown = of_panel(arms)
        shown += [of_pair(*pair) for pair in PAIRS.get(title, ())]
        for effect in shown:
            x, y = effect.loss, effect.difference
            sure = side(y) != 0
            colour = VERDICTS[verdict(y)]
            axes.errorbar(
                x.mean, y.mean, y.half_width, x.half_width, fmt='o',
                color=colour, markersize=5, elinewidth=1,
                zorder=3 if sure else 2,
            )  # fmt: skip
            if sure and effect.setting in NAMED:
                text, place, align = NAMED[effect.setting]
                axes.annotate(
                    text, (x.mean, y.mean), xytext=place, ha=align,
                    textcoords='offset points', color=colour, fontsize=10,
                )  # fmt: skip
        axes.spines[['top', 'right']].set_visible(False)
    spread_points(panels[0], -1, 40)
    panels[0].set_ylim(-2.9, 4.6)
    handles = [
        panels[0].errorbar([], [], [], fmt='o', color=colour, markersize=5)
        for colour in VERDICTS.values()
    ]
    panels[0].legend(
        handles, VERDICTS, title='95% interval', frameon=False,
        loc='upper left',
    )  # fmt: skip
    figure.supylabel('points of top-1 gained over plain training', fontsize=11)
    figure.supxlabel(
        'points that plain low-bit training loses to float', fontsize=11
    )
    return figure


if __name__ == '__main__':
    save(draw, __file__)
