"""Several comparisons side by side."""

import json

import pytest
from matplotlib import pyplot as plt

from mmauxq.compare.figures import plot_effects, plot_gain
from mmauxq.compare.meta_comparison import (
    Effect,
    effects,
    table,
    together,
    without_start,
)
from mmauxq.errors import UsageError
from tests.compare.conftest import record


def write(folder, **arms):
    """Final top-1 of each arm, by seed, as a comparison leaves them."""
    folder.mkdir()
    lines = [
        json.dumps(record(arm, seed, final) | dict(step_seconds=seconds))
        for arm, (seconds, finals) in arms.items()
        for seed, final in finals.items()
    ]
    (folder / 'results.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


@pytest.fixture
def folders(tmp_path):
    return [
        write(
            tmp_path / 'float',
            plain=(0.1, {0: 90.0, 1: 92.0}),
            aux=(0.15, {1: 92.5, 0: 91.0, 2: 99.0}),
            other=(0.3, {7: 50.0}),
        ),
        write(
            tmp_path / 'scratch',
            plain=(0.2, {3: 60.0}),
            aux=(0.2, {3: 61.5}),
        ),
    ]


def test_each_arm_beside_the_reference_of_its_folder(folders):
    first, second = effects(folders)
    assert (first.setting, first.arm) == ('float', 'aux')
    assert first.reference == (90.0, 92.0)
    assert (first.difference.mean, first.difference.pairs) == (0.75, 2)
    assert first.difference.wins == 2
    assert first.step == pytest.approx(1.5)
    assert (second.setting, second.difference.mean) == ('scratch', 1.5)
    text = table([first, second]).splitlines()
    assert text[2] == (
        '| float | 91.00 ± 1.41 | aux | +0.75 [-2.43, +3.93], 2 of 2 above '
        '| 1.50 |'
    )
    assert text[3] == '| scratch | 60.00 | aux | +1.50, 1 of 1 above | 1.00 |'


def test_arms_of_several_settings_together(folders):
    """The setting is the unit: its mean is 0.75, that of the other 1.5."""
    found = effects(folders)
    (aux,) = together(found)
    assert aux.arm == 'aux, 2 settings'
    assert aux.difference.mean == pytest.approx(1.125)
    # t = 12.706 with one degree of freedom
    assert aux.difference.half_width == pytest.approx(12.706 * 0.375, 1e-4)
    assert (aux.difference.wins, aux.difference.pairs) == (2, 2)
    assert aux.reference == (91.0, 60.0)
    assert aux.step == pytest.approx(1.25)
    assert together(found[:1]) == []
    # all pairs: 1.0, 0.5 and 1.5, what is left of clusters -0.5 and 0.5
    error = (2 * (0.25 + 0.25)) ** 0.5 / 3
    width = 12.706 * error
    clustered = f'+1.00 [{1 - width:+.2f}, {1 + width:+.2f}]'
    assert table(found, [aux]).splitlines()[4:] == [
        '',
        '| arm | settings | mean of settings, 95% interval, wins | pairs | '
        'mean of pairs, 95% interval clustered by setting | step |',
        '| --- | --- | --- | --- | --- | --- |',
        '| aux | 2 | +1.12 [-3.64, +5.89], 2 of 2 above | 3 '
        f'| {clustered} | 1.25 |',
        '',
        'Comparisons: 3. One interval in twenty excludes 0 by chance.',
    ]
    assert 'Comparisons: 2.' in table(found)


def test_steps_that_cannot_be_compared(folders, tmp_path):
    """One run there shared its GPU: the ratio is left out."""
    file = folders[1] / 'results.jsonl'
    file.write_text(file.read_text().replace('{"arm', '{"shared": true, "arm'))
    found = effects(folders)
    assert [e.step for e in found] == [pytest.approx(1.5), None]
    assert table(found).splitlines()[3].endswith('1 of 1 above |  |')
    (aux,) = together(found)
    assert aux.step == pytest.approx(1.5)
    (aux,) = together([found[1]] * 2)
    assert aux.step is None


def test_another_reference(folders):
    found = effects(folders, 'aux')
    assert [e.difference.mean for e in found] == [-0.75, -1.5]


def test_nothing_to_compare(folders, tmp_path):
    with pytest.raises(
        UsageError, match="expected an arm 'kd', got plain, aux"
    ):
        effects(folders, 'kd')
    with pytest.raises(UsageError, match='no finished run'):
        effects([tmp_path])
    lonely = write(tmp_path / 'lonely', plain=(0.1, {0: 1.0}))
    with pytest.raises(UsageError, match='two arms that share a seed'):
        effects([lonely])


def test_the_figure(folders, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        'mmauxq.compare.figures.save_figure',
        lambda figure, path: kept.append(figure),
    )
    plot_effects(tmp_path / 'map.png', effects(folders))
    (axes,) = kept[0].axes
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ['float (91.0%)', 'aux', 'scratch (60.0%)', 'aux']
    points = [
        line.get_xdata()[0] for line in axes.lines if line.get_marker() == 'o'
    ]
    assert points == [0.75, 1.5]
    plt.close(kept[0])


def test_what_the_reference_loses_to_its_float_network(folders):
    """It is in the records of the one folder, and not in those of the
    other."""
    file = folders[0] / 'results.jsonl'
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    known = [
        json.dumps(x | dict(float_final=94 + x['seed'] % 7)) for x in lines
    ]
    file.write_text('\n'.join(known) + '\n')
    first, second = found = effects(folders)
    assert first.start == (94.0, 95.0)  # the shared seeds, 0 and 1
    assert (first.loss.mean, first.loss.pairs) == (3.5, 2)
    assert first.loss.half_width == pytest.approx(12.706 * 0.5, 1e-4)
    assert second.loss is None
    assert without_start(found).endswith('is not in the records: scratch.\n')
    assert without_start([first]) == ''


def test_the_figure_of_gains(tmp_path, monkeypatch):
    """A point for each arm of a setting whose loss is known."""
    kept = []
    monkeypatch.setattr(
        'mmauxq.compare.figures.save_figure',
        lambda figure, path: kept.append(figure),
    )
    low, high = (80.0, 82.0), (90.0, 91.0)
    shown = [
        Effect('a', 'aux', (82.0, 83.0), low, None, start=(93.0, 93.0)),
        Effect('a', 'kd', (83.0,), low[:1], None, start=(93.0,)),
        Effect('b', 'aux', high, high, None, start=(90.5, 90.5)),
        Effect('c', 'aux', high, low, None),
    ]
    plot_gain(tmp_path / 'gain.png', shown)
    (axes,) = kept[0].axes
    points = {
        (*line.get_xydata()[0], line.get_markerfacecolor())
        for line in axes.lines
        if line.get_marker() in ('o', 's')
    }
    black, white = '#000000', 'white'
    assert points == {(12, 1.5, black), (13, 3, white), (0, 0, black)}
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ['aux', 'kd']
    left, right = axes.get_xlim()
    assert left < 0 - 12.706 * 0.5 < 12 + 12.706 < right
    plt.close(kept[0])

    file = tmp_path / 'gain.png'
    file.touch()
    plot_gain(file, shown[3:])
    assert not file.exists()


def test_only_comparisons_by_one_metric_stand_side_by_side(folders):
    file = folders[1] / 'results.jsonl'
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    other = [json.dumps(line | dict(metric='a/recall')) for line in lines]
    file.write_text('\n'.join(other) + '\n')
    with pytest.raises(UsageError, match='some by a/recall and some by top-1'):
        effects(folders)
    assert '| reference, a/recall |' in table(effects(folders[1:]))
