"""The figures of docs/map.md, and what its tables leave out."""

import pytest

from docs.figures import cost, gain
from docs.tables import map as map_tables
from docs.tables.records import number
from mmauxq.compare.statistics import paired_difference
from tests.conftest import ROOT


def test_all_records_are_in_a_table_or_on_the_other_page():
    named = {
        *map_tables.FROM_FLOAT,
        *map_tables.BESIDE_FLOAT,
        *map_tables.SCRATCH,
    }
    assert named <= {folder.name for folder in map_tables.LOGS.iterdir()}
    pages = [ROOT / 'docs' / name for name in ('map.md', 'experiments.md')]
    text = ' '.join(page.read_text() for page in pages)
    for folder in map_tables.LOGS.iterdir():
        assert folder.name in text or folder.name.startswith(
            'fmnist_narrow_steps'
        ), folder.name


def test_a_point_of_the_figure():
    """56 layers: what plain training loses, and what both bring back."""
    found = gain.of_panel(gain.PANELS['the module and a teacher'])
    point = next(e for e in found if e.setting == 'fmnist_depth56')
    assert point.loss.mean == pytest.approx(0.28, abs=0.01)
    assert point.difference.mean == pytest.approx(0.22, abs=0.01)
    assert point.difference.pairs == 5
    assert len(found) == 20


@pytest.mark.parametrize(
    'plain, guided, lost, gained, where',
    [
        ('w4', 'w4wide', -0.74, 1.29, 'above 0'),
        ('plain', 'kdw4', 4.51, 0.12, 'contains 0'),
        ('plain', 'auxkdw4', 4.51, -0.46, 'below 0'),
    ],
)
def test_points_of_a_wide_teacher(plain, guided, lost, gained, where):
    """Those of experiments.md, of the network of a quarter of the width."""
    pair = (gain.QUARTER, plain), (gain.QUARTER, guided)
    point = gain.of_pair(*pair)
    assert pair in [p for pairs in gain.PAIRS.values() for p in pairs]
    assert point.loss.mean == pytest.approx(lost, abs=0.01)
    assert point.difference.mean == pytest.approx(gained, abs=0.01)
    assert gain.verdict(point.difference) == where


def test_float_networks_of_the_figure_are_those_of_the_page():
    page = (ROOT / 'docs/map.md').read_text()
    for name, top1 in gain.FLOAT.items():
        if name.startswith('map/'):
            assert f'| {top1} |' in page, name


@pytest.mark.parametrize(
    'found, least, verdict',
    [
        ([0.7, 0.8, 0.9], 0.5, 'yes: +0.80 [+0.55, +1.05]'),
        ([0.6, 0.8, 1.0], 0.5, 'not shown: +0.80 [+0.30, +1.30]'),
        ([-0.4, -0.5, -0.6], -0.1, 'no: -0.50 [-0.75, -0.25]'),
    ],
)
def test_an_aim_is_settled_by_the_interval(found, least, verdict):
    """2.484 is half the width, in standard deviations of three pairs."""
    pairs = paired_difference(found, [0.0, 0.0, 0.0])
    assert map_tables.settled(pairs, least) == verdict


def test_bars_are_those_of_the_table_of_steps():
    page = (ROOT / 'docs/speed.md').read_text()
    panels = cost.draw().axes
    lengths = [[bar.get_width() for bar in axes.patches] for axes in panels]
    rows = cost.steps('r50', 256)
    for arm, ms, gib in zip(cost.BARS, *lengths, strict=True):
        assert (ms, gib) == (rows[arm]['ms'], rows[arm]['peak_gib'])
        assert f'| {number(ms)} |' in page and f'| {number(gib)} |' in page
