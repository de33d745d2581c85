"""Draw cost.svg: time and memory of a step of ResNet-50.

python -m docs.figures.cost
"""

from matplotlib import pyplot as plt

from mmauxq.compare.figures import COLOURS

from ..tables.records import number
from ..tables.speed import steps
from .svg import save

BARS = {
    'float/compiled': 'float, compiled',
    'float/eager': 'float, eager',
    'w4a4/graphed': 'W4A4',
    'w4a4/graphed-codes': "the same, memory='codes'",
    'w4a4/graphed-recompute': "the same, memory='recompute'",
    'aux-quarter/graphed': 'W4A4, module of quarter width',
    'aux-quarter/graphed-codes': "the same, memory='codes'",
    'kd/graphed': 'W4A4, teacher',
    'aux/graphed': 'W4A4, module of full width',
    'aux/graphed-codes': "the same, memory='codes'",
    'aux/graphed-recompute': "the same, memory='recompute'",
}
"""WHAT/FORM of a step, as ``python -m benchmarks`` calls it -> its label."""


KINDS = {'float': COLOURS[0], 'w4a4': COLOURS[1]}
"""WHAT -> colour of its bars; those with guidance have another one."""


def draw() -> plt.Figure:
    """The figure."""
    figure, panels = plt.subplots(
        1, 2, figsize=(7.6, 4.2), sharey=True, layout='constrained'
    )
    figure.suptitle(
        'A training step of ResNet-50: batch 256, bfloat16, one H200',
        fontsize=12,
    )
    found = steps('r50', 256)
    places = range(len(BARS))
    colours = [KINDS.get(arm.split('/')[0], COLOURS[2]) for arm in BARS]
    for axes, (name, key) in zip(
        panels, {'ms': 'ms', 'peak memory, GiB': 'peak_gib'}.items(),
        strict=True,
    ):  # fmt: skip
        values = [found[arm][key] for arm in BARS]
        bars = axes.barh(places, values, color=colours)
        axes.bar_label(bars, fmt=number, padding=2, fontsize=8)
        axes.margins(x=0.12)
        axes.set_xlabel(name)
        axes.spines[['top', 'right']].set_visible(False)
    panels[0].set_yticks(places, BARS.values())
    panels[0].invert_yaxis()
    return figure


if __name__ == '__main__':
    save(draw, __file__)
