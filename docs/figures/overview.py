"""Draw overview.svg: F, its taps, the auxiliary module H and the two losses.

python -m docs.figures.overview
"""

from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from .svg import save

LOW, FULL = '#d6e6f4', '#fde3cf'
EDGE_LOW, EDGE_FULL = '#2f6ca3', '#c2661b'
NAMES = ['stem', 'block 1', 'block 2', 'block P']
COLUMNS = [1.9, 3.9, 5.9, 8.5]
F_ROW, ADAPTOR_ROW, SUM_ROW = 0.8, 2.5, 4.0


def box(axes, x, y, text, low, width=1.25):
    """A rounded box around (x, y)."""
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.28), width, 0.56,
            boxstyle='round,pad=0.02,rounding_size=0.12',
            facecolor=LOW if low else FULL,
            edgecolor=EDGE_LOW if low else EDGE_FULL, linewidth=1.3,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha='center', va='center', fontsize=10.5)


def arrow(axes, start, end, colour='#444444'):
    """From one point to another."""
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle='-|>', mutation_scale=11,
            color=colour, linewidth=1.2, shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def draw():
    """The figure."""
    figure, axes = plt.subplots(figsize=(11.2, 4.6))
    axes.set_xlim(-0.3, 13.3)
    axes.set_ylim(-0.25, 5.25)
    axes.axis('off')
    axes.add_patch(
        FancyBboxPatch(
            (0.95, 1.95), 12.0, 2.6, facecolor='none', linestyle='--',
            boxstyle='round,pad=0.05,rounding_size=0.2',
            edgecolor=EDGE_FULL, linewidth=1,
        )
    )  # fmt: skip
    axes.text(
        6.95, 4.85, 'H, the auxiliary module: full precision, in training '
        'only, thrown away before shipping',
        ha='center', color=EDGE_FULL, fontsize=11,
    )  # fmt: skip
    axes.text(
        6.3, -0.1, 'F, the network: weights and activations of 2 to 4 bits, '
        'all that is shipped',
        ha='center', color=EDGE_LOW, fontsize=11,
    )  # fmt: skip
    axes.text(0.35, F_ROW, 'images', ha='center', va='center', fontsize=10.5)
    arrow(axes, (0.8, F_ROW), (COLUMNS[0] - 0.66, F_ROW))
    ends = zip(COLUMNS, COLUMNS[1:], strict=False)
    for here, there in ends:
        for row, half in ((F_ROW, 0.66), (SUM_ROW, 0.3)):
            if there == COLUMNS[-1]:
                middle = (here + there) / 2
                axes.text(middle, row, '...', ha='center', fontsize=14)
                arrow(axes, (here + half, row), (middle - 0.25, row))
                arrow(axes, (middle + 0.25, row), (there - half, row))
            else:
                arrow(axes, (here + half, row), (there - half, row))
    for i, (x, name) in enumerate(zip(COLUMNS, NAMES, strict=True)):
        index = 'P' if name == 'block P' else str(i)
        box(axes, x, F_ROW, name, True)
        arrow(axes, (x, F_ROW + 0.3), (x, ADAPTOR_ROW - 0.3), EDGE_LOW)
        if i:
            axes.text(x + 0.1, 1.5, f'tap $O_{index}$', color=EDGE_LOW)
        box(axes, x, ADAPTOR_ROW, rf'adaptor $\phi_{index}$', False, 1.4)
        arrow(axes, (x, ADAPTOR_ROW + 0.3), (x, SUM_ROW - 0.3), EDGE_FULL)
        box(axes, x, SUM_ROW, f'$g_{index}$' if not i else '+', False, 0.5)
    for row, low, loss in (
        (F_ROW, True, r'$L_F$'),
        (SUM_ROW, False, r'$L_H$'),
    ):
        half = 0.66 if low else 0.3
        arrow(axes, (COLUMNS[-1] + half, row), (9.93, row))
        box(axes, 10.85, row, 'pool, classifier', low, 1.8)
        arrow(axes, (11.77, row), (12.2, row))
        axes.text(12.5, row, loss, ha='center', va='center', fontsize=14)
    axes.text(
        12.45, 2.35, r'$L = L_F + w\, L_H$', ha='right', va='center',
        fontsize=14,
    )  # fmt: skip
    return figure


if __name__ == '__main__':
    save(draw, __file__, bbox_inches='tight')
