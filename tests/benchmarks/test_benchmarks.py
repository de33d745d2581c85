"""The benchmark's names, tables and, on the CPU, that it runs."""

import importlib.util
import json

import pytest
import torch

from mmauxq.errors import UsageError
from mmauxq.evaluation import benchmark, benchmark_ops, benchmark_report
from mmauxq.evaluation.timing import timed
from tests.conftest import process_environment

MACHINE = dict(device='a GPU', torch='2')


def step_row(what, form, ms, gib):
    return dict(
        MACHINE, arm=f'step/r50/{what}/{form}/256', network='r50', what=what,
        form=form, batch=256, ms=ms, low=ms - 1, high=ms + 1, repeats=9,
        peak_gib=gib,
    )  # fmt: skip


def test_names_are_chosen_by_pattern():
    everything = benchmark.chosen([])
    assert everything == benchmark.ARMS
    assert len(set(everything)) == len(everything) > 40
    found = benchmark.chosen(['step/r50/w4a4/*/256', 'ops/activations'])
    assert 'step/r50/w4a4/recompute/256' in found
    assert found[-1] == 'ops/activations'
    assert benchmark.chosen(['step/r34/w4a4/eager/8']) == [
        'step/r34/w4a4/eager/8'
    ]
    with pytest.raises(UsageError, match='--only stop/.*no measurement'):
        benchmark.chosen(['stop/*'])


def test_every_recipe_of_the_benchmark_exists(root):
    from mmauxq.evaluation.benchmark_steps import (
        FORMS,
        OPTIONS,
        RECIPES,
    )

    for name in benchmark.ARMS:
        kind, *parts = name.split('/')
        if kind not in ('step', 'runner'):
            continue
        network, what, form, _ = parts
        recipe = RECIPES[what][0]
        assert (root / f'configs/{recipe}_{network}_w4a4.py').is_file(), name
        assert form in (FORMS if kind == 'step' else OPTIONS), name


def test_ratios_are_to_the_float_network(tmp_path):
    rows = [
        step_row('float', 'compiled', 40.0, 10.0),
        step_row('float', 'eager', 50.0, 12.0),
        step_row('w4a4', 'compiled', 99.0, 9.0),
        step_row('w4a4', 'compiled', 44.0, 9.0),
        dict(arm='step/r50/aux/eager/256', error='out of memory'),
    ]
    text = benchmark_report.markdown(rows)
    line = '| r50, batch 256 | w4a4 | compiled | 44 (43-45) | 1.10 | 0.88 '
    assert line + '| 9.00 | 0.75 |' in text
    assert ' 99 ' not in text  # measured again
    assert '- `step/r50/aux/eager/256` : out of memory' in text
    benchmark_report.write(rows, tmp_path)
    assert (tmp_path / 'steps.png').stat().st_size > 5000
    assert (tmp_path / 'table.md').read_text() == text


def test_the_median_and_its_spread():
    result = timed(lambda: None, repeats=11, warmup=0)
    assert result.repeats == 11
    assert 0 <= result.low <= result.ms <= result.high


def test_all_quantizers_run():
    rows = list(benchmark_ops.activations('cpu', 1, tiny=True))
    names = {row['name'] for row in rows if 'error' not in row}
    assert {'copy', 'mmauxq, reference', 'torch, learned step'} <= names
    assert 'mmrazor' in names
    for row in rows:
        if row['name'] == 'torch, fixed step':
            assert row['forward_ms'] > 0 and row['backward_of_copy'] > 0
    w = torch.randn(4, 3, requires_grad=True)
    s = torch.ones(4, requires_grad=True)
    (row,) = benchmark_ops.weights([(w, s)], torch.bfloat16, 'cpu', 1)
    assert (row['weights'], row['values']) == (1, 12)


@pytest.fixture
def command(root):
    """``main`` of the tool."""
    spec = importlib.util.spec_from_file_location(
        'benchmark_tool', root / 'tools/benchmark.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.slow
def test_command(command, tmp_path, monkeypatch, root, capsys):
    """One that runs, one that fails; the second run has nothing to do."""
    for name, value in process_environment(root).items():
        monkeypatch.setenv(name, value)
    options = [
        '--out', str(tmp_path), '--repeats', '1', '--size', '32',
        '--jobs', '2', '--only', 'step/r18/w4a4/codes/2',
    ]  # fmt: skip
    assert command([*options, 'ops/nothing']) == 1
    assert 'ops/nothing: missing' in capsys.readouterr().err
    lines = (tmp_path / 'results.jsonl').read_text().splitlines()
    good = [row for row in map(json.loads, lines) if 'error' not in row]
    assert [row['arm'] for row in good] == ['step/r18/w4a4/codes/2']
    assert good[0]['ms'] > 0 and good[0]['first_loss'] > 0
    assert '## Training steps' in (tmp_path / 'table.md').read_text()
    assert command(options) == 0
    assert len((tmp_path / 'results.jsonl').read_text().splitlines()) == 2


def test_bad_options_are_one_line(command, capsys):
    assert command(['--only', 'nix']) == 2
    assert command(['--jobs', '0']) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith('error: --only nix: no measurement')
    assert second == 'error: --jobs 0: allowed are numbers from 1'
