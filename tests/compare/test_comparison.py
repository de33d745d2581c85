import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from mmauxq.compare import comparison, figures
from mmauxq.compare import training_run as trial
from mmauxq.compare.arms import read_arms
from mmauxq.compare.figures import _mean_norms, plot_comparison
from mmauxq.compare.records import commit
from mmauxq.errors import TrainingError, UsageError
from mmauxq.stopping import Stopped
from tests.compare.conftest import record
from tests.conftest import ROOT
from tests.support.file_operations import killed_at

QAT = ROOT / 'configs/qat_r20_w2a2_digits.py'
AUX = ROOT / 'configs/aux_r20_w2a2_digits.py'


def records():
    finals = dict(plain=[90.0, 91.0, 92.0], aux=[91.0, 93.0, 92.5])
    return [
        record(arm, seed, final, peak_memory=2**20 * (1 + seed))
        | dict(step_seconds=0.01 * (1 + (arm == 'aux')))
        for arm, values in finals.items()
        for seed, final in enumerate(values)
    ]


def write(out, items):
    for item in items:
        folder = out / 'runs' / item['arm'] / str(item['seed'])
        folder.mkdir(parents=True)
        (folder / 'result.json').write_text(json.dumps(item))


def test_a_folder_keeps_what_is_finished(tmp_path):
    arms = read_arms([f'plain={QAT}'])
    runs = comparison.plan(tmp_path, arms, [0, 1])
    runs[0].result.write_text(json.dumps(record('plain', 0)))
    more = read_arms([f'plain={QAT}', f'aux={AUX}'])
    again = comparison.plan(tmp_path, more, [0, 1])
    assert [(r.arm, r.seed) for r in again if r.result.is_file()] == [
        ('plain', 0)
    ]
    assert len(again) == 4
    # nothing left to train for a finished run
    assert list(comparison.train(again[:1], 1)) == []


def test_a_folder_of_another_comparison_is_refused(tmp_path):
    comparison.plan(tmp_path, read_arms([f'plain={QAT}']), [0])
    other = read_arms([f'plain={AUX}'])
    with pytest.raises(UsageError, match="holds an arm 'plain' with another"):
        comparison.plan(tmp_path, other, [0])


TUNING = dict(key='a', values=[1, 2], hold_out=3, seeds=[4])
TERMS = dict(start='float.py', metric='x', options={'a': (1, 2)}, tuning=None)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(start='f.pth'), "--float 'float.py', got 'f.pth'"),
        (dict(start=None), "--float 'float.py', got None"),
        (dict(metric='y'), "--metric 'x', got 'y'"),
        (dict(options={}), r"--cfg-options {'a': \[1, 2\]}, got {}"),
        (dict(tuning=TUNING), "--tune None, got {'key': 'a', .*}"),
    ],
)
def test_a_folder_that_began_on_other_terms(tmp_path, change, message):
    comparison.begin(tmp_path, **TERMS | change)
    comparison.begin(tmp_path, **TERMS)  # no arm has begun
    comparison.plan(tmp_path, read_arms([f'plain={QAT}']), [0])
    with pytest.raises(UsageError, match=f'was begun with {message}; choose'):
        comparison.begin(tmp_path, **TERMS | change)
    comparison.begin(tmp_path, **TERMS)
    described = comparison.describe(tmp_path)
    assert list(described['arms']) == ['plain']
    assert described['start'] == 'float.py'
    assert described['commit'] == commit()


def test_a_folder_of_an_early_version_goes_on(tmp_path):
    """Its description has the arms alone."""
    comparison.plan(tmp_path, read_arms([f'plain={QAT}']), [0])
    comparison.begin(tmp_path, **TERMS)
    with pytest.raises(UsageError, match='was begun with --tune None'):
        comparison.begin(tmp_path, **TERMS | dict(tuning=TUNING))


def test_a_plan_that_is_killed_at_any_moment(tmp_path):
    """The folder holds an arm; another one is added to it."""
    plain = read_arms([f'plain={QAT}'])
    both = plain | read_arms([f'aux={AUX}'])
    texts = [config.pretty_text for config in both.values()]  # once
    seen = set()
    for number in itertools.count():
        out = tmp_path / str(number)
        (run,) = comparison.plan(out, plain, [0])
        run.result.write_text(json.dumps(record()))
        if not killed_at(
            number, out, lambda out=out: comparison.plan(out, both, [0, 1])
        ):
            break
        seen.add(tuple(comparison.describe(out)['arms']))
        recipes = [file.read_text() for file in out.glob('runs/*/*/recipe.py')]
        assert set(recipes) <= set(texts)
        comparison.plan(out, both, [0, 1])
        assert list(comparison.describe(out)['arms']) == ['plain', 'aux']
        assert not list(out.rglob('*.part'))
        assert comparison.collect(out) == [record()]
    assert number > 20 and seen == {('plain',), ('plain', 'aux')}


def test_a_collection_that_is_killed_at_any_moment(tmp_path):
    write(tmp_path, records()[:1])
    comparison.collect(tmp_path)
    write(tmp_path, records()[1:])
    counts = set()
    for number in itertools.count():
        if not killed_at(
            number, tmp_path, lambda: comparison.collect(tmp_path)
        ):
            break
        lines = (tmp_path / 'results.jsonl').read_text().splitlines()
        counts.add(len([json.loads(line) for line in lines]))
    assert counts == {1, 6}
    comparison.collect(tmp_path)
    assert not list(tmp_path.glob('*.part'))


def test_a_damaged_result_is_trained_again(tmp_path, capsys):
    runs = comparison.plan(tmp_path, read_arms([f'plain={QAT}']), [0, 1, 2])
    for run in runs:
        run.result.write_text(json.dumps(record('plain', run.seed)))
    damaged = runs[1].result
    damaged.write_text(damaged.read_text().replace('90.0', 'NaN'))
    with pytest.raises(UsageError, match='1/result.json: final: expected a'):
        comparison.collect(tmp_path)
    assert [comparison._is_finished(run) for run in runs] == [
        True,
        False,
        True,
    ]
    err = capsys.readouterr().err
    assert err == (
        f'warning: {damaged}: final: expected a number from 0 to 100, got '
        'nan; trained again\n'
    )
    assert not damaged.exists()


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'expected JSON'),
        (b'{"arms": {"plain": "', 'expected JSON'),
        (b'\xff', 'cannot be read'),
        (b'[' * 100_000, 'expected JSON'),
        (b'[]', 'expected `arms`, the config of each by its name, got'),
        (b'{"arms": []}', 'expected `arms`'),
        (b'{"arms": {"..": ""}}', 'expected `arms`'),
        (b'{"arms": {"plain": 3}}', 'expected `arms`'),
        (b'{"arms": {}, "diverged": {"a": 3}}', 'expected `diverged`'),
    ],
)
def test_a_damaged_description_is_named(tmp_path, content, message):
    """And the comparison goes on without it."""
    arms = read_arms([f'plain={QAT}'])
    (run,) = comparison.plan(tmp_path, arms, [0])
    run.result.write_text(json.dumps(record()))
    file = tmp_path / 'comparison.json'
    file.write_bytes(content)
    for use in (
        lambda: comparison.plan(tmp_path, arms, [0]),
        lambda: comparison.collect(tmp_path),
    ):
        with pytest.raises(UsageError, match=message) as error:
            use()
        assert str(error.value).startswith(f'{file}: ')
        assert '\n' not in str(error.value)
    file.unlink()
    comparison.plan(tmp_path, arms, [0])
    assert comparison.collect(tmp_path) == [record()]


def test_the_table(tmp_path):
    write(tmp_path, records())
    found = comparison.collect(tmp_path)
    assert len((tmp_path / 'results.jsonl').read_text().splitlines()) == 6
    text = comparison.table(found, 'plain')
    low, high = stats.ttest_rel(
        [91, 93, 92.5], [90, 91, 92]
    ).confidence_interval()
    expected = f'+1.17 [{low:+.2f}, {high:+.2f}], 3 of 3 above'
    assert (
        f'| aux | 3 | 92.17 ± 1.04 | 93.17 ± 1.04 | {expected} | 20.0 ms | '
        '+8.0%, +12.5% | 3 MiB |'
    ) in text
    assert '| plain | 3 | 91.00 ± 1.00 | 92.00 ± 1.00 |  | 10.0 ms |' in text


@pytest.mark.parametrize(
    'change', [dict(shared=True), dict(gpu='NVIDIA L4')], ids=str
)
def test_steps_beside_others_or_on_other_cards_are_not_shown(tmp_path, change):
    """Not even those of the other arm, whose runs waited for that one."""
    alike = [dict(r, gpu='NVIDIA H100', shared=False) for r in records()]
    assert '| 10.0 ms |' in comparison.table(alike, 'plain')
    plot_comparison(tmp_path, alike)
    assert (tmp_path / 'cost.png').is_file()
    alike[-1] |= change
    rows = comparison.table(alike, 'plain').splitlines()
    head, plain, aux = (
        [cell.strip() for cell in rows[i].split('|')] for i in (0, 2, 3)
    )
    place = head.index('step')
    assert (plain[place], aux[place]) == ('', '')
    assert (plain[1], aux[-2]) == ('plain', '3 MiB')
    plot_comparison(tmp_path, alike)
    assert not (tmp_path / 'cost.png').exists()
    assert (tmp_path / 'accuracy.png').is_file()


def test_the_table_from_the_lines_alone(tmp_path):
    """As it is done for what the docs show."""
    write(tmp_path / 'a', records())
    comparison.collect(tmp_path / 'a')
    (tmp_path / 'a/results.jsonl').rename(tmp_path / 'results.jsonl')
    shown = comparison.table(comparison.collect(tmp_path), 'aux')
    expected = comparison.table(records(), 'aux')
    assert sorted(shown.splitlines()) == sorted(expected.splitlines())


def test_arms_keep_the_order_in_which_they_were_asked_for(tmp_path):
    arms = read_arms([f'plain={QAT}', f'aux={AUX}'])
    for run in comparison.plan(tmp_path, arms, [1, 0]):
        run.result.write_text(json.dumps(record(run.arm, run.seed)))
    assert [(r['arm'], r['seed']) for r in comparison.collect(tmp_path)] == [
        ('plain', 0),
        ('plain', 1),
        ('aux', 0),
        ('aux', 1),
    ]


def test_only_shared_seeds_are_compared():
    some = [r for r in records() if (r['arm'], r['seed']) != ('aux', 0)]
    assert '2 of 2 above' in comparison.table(some, 'plain')


def test_nothing_to_show(tmp_path):
    with pytest.raises(UsageError, match='no finished run'):
        comparison.collect(tmp_path)
    with pytest.raises(
        UsageError, match="expected one of plain, aux, got 'kd'"
    ):
        comparison.table(records(), 'kd')


def test_figures(tmp_path, monkeypatch):
    drawn = {}
    save = figures.save_figure

    def keep(figure, path):
        (drawn[path.name],) = figure.axes
        save(figure, path)

    monkeypatch.setattr(figures, 'save_figure', keep)
    plot_comparison(tmp_path, records())
    assert {p.name for p in tmp_path.iterdir()} == set(drawn)
    accuracy, cost, gradients = (
        [line.get_xydata().tolist() for line in drawn[f'{name}.png'].lines]
        for name in ('accuracy', 'cost', 'gradients')
    )
    assert accuracy == [
        [[1, 50], [2, 91]],
        [[1, 50], [2, pytest.approx(92.1667)]],
    ]
    # the points; the rest are the ends of their bars
    assert [pytest.approx([10, 91])] in cost
    assert [pytest.approx([20, 92.1667])] in cost
    assert gradients == [
        [[0, pytest.approx(6 ** (1 / 3))], [1, pytest.approx(2)]],
        [[0, pytest.approx(4)], [1, pytest.approx(9)]],
    ]


def test_the_gradients_that_are_drawn():
    """Of all losses; the geometric mean over seeds."""
    runs = dict(plain=[], aux=[])
    for run in records():
        runs[run['arm']].append(run)
    norms = _mean_norms(runs['plain'])
    assert norms == pytest.approx({'a': 6 ** (1 / 3), 'b': 2.0})
    assert _mean_norms(runs['aux']) == pytest.approx({'a': 4.0, 'b': 9.0})
    assert _mean_norms([dict(gradients={})]) == {}


def test_a_run_that_fails_stops_the_comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'executable', '/bin/false')
    runs = comparison.plan(tmp_path, read_arms([f'plain={QAT}']), [0])
    with pytest.raises(UsageError, match="arm 'plain', seed 0 failed"):
        list(comparison.train(runs, 1))
    log = runs[0].folder / 'log.txt'
    log.write_bytes(b'\xff\nmmauxq.errors.TrainingError: the \x1b[2Jdisk')
    with pytest.raises(TrainingError, match=r'TrainingError: the \[2Jdisk'):
        list(comparison.train(runs, 1))


def test_a_run_that_diverges_is_left_out(tmp_path, monkeypatch):
    """Of the arms; a float network that diverges is an error."""
    monkeypatch.setattr(sys, 'executable', '/bin/false')
    arms = read_arms([f'plain={QAT}', f'aux={AUX}'])
    runs = comparison.plan(tmp_path, arms, [0, 1])
    plain, bad, good, worse = runs
    for run in (plain, good):
        run.result.write_text(json.dumps(record('plain', run.seed, 90.0)))
    for run in (bad, worse):
        words = 'step 3: NaN or infinity, first in backbone.conv1'
        (run.folder / 'log.txt').write_text(f'x.TrainingError: {words}')
    with pytest.raises(TrainingError, match='NaN or infinity, first in'):
        list(comparison.train(runs, 1))
    assert not bad.diverged.exists()
    list(comparison.train(runs, 1, may_diverge=True))
    comparison.note_diverged(tmp_path)
    description = comparison.describe(tmp_path)
    assert description['diverged'] == {'aux': [0, 1]}
    assert comparison.diverged(description) == (
        "warning: arm 'aux' ended in NaN or infinity with seeds 0, 1; the "
        'table is of the others\n'
    )
    assert [r['arm'] for r in comparison.collect(tmp_path)] == ['plain'] * 2
    # the same command trains nothing again, unless the mark is deleted
    assert list(comparison.train(runs, 1)) == []
    for run in (bad, worse):
        run.diverged.unlink()
    comparison.note_diverged(tmp_path)
    assert comparison.diverged(comparison.describe(tmp_path)) == ''


@pytest.mark.parametrize('kind', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_runs_wherever_it_comes(
    tmp_path, monkeypatch, kind
):
    """Here while another error is handled, which would swallow it."""
    runs = [comparison.Run('a', i, tmp_path / str(i)) for i in range(3)]
    for run in runs:
        run.folder.mkdir()
    begun = []

    def begin(run, start, gpu, metric):
        begun.append(subprocess.Popen(['sleep', '600']))
        return begun[-1]

    monkeypatch.setattr(comparison, '_begin', begin)
    before = [signal.getsignal(k) for k in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped, match=kind.name):
        for active in comparison.train(runs, 2):
            assert list(active) == runs[:2]
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), kind)
    assert [process.poll() for process in begun] == [-signal.SIGTERM] * 2
    after = [signal.getsignal(k) for k in (signal.SIGINT, signal.SIGTERM)]
    assert after == before


def test_a_run_ends_with_the_comparison_that_began_it(monkeypatch):
    """Or the next comparison would train it a second time, beside it."""
    calls = []
    monkeypatch.setattr(trial, 'end_with', lambda parent: calls.append(parent))
    monkeypatch.setattr(trial, 'run_one', lambda *args: calls.append(args))
    trial.main(['folder', '3', 'start.pth'])
    assert calls == [os.getppid(), (Path('folder'), 3, 'start.pth')]
