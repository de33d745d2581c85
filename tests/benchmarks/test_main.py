"""The command, called in this process."""

import json
from functools import partial

import pytest

from benchmarks import __main__ as command
from mmauxq.cli.run_command import run_command

main = partial(run_command, command, prog='python -m benchmarks')


@pytest.mark.slow
def test_one_that_runs_and_one_that_fails(tmp_path, monkeypatch, capsys):
    """The second time there is nothing to do."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    options = [
        '--out', str(tmp_path), '--repeats', '1', '--size', '32',
        '--jobs', '2', '--only', 'step/r18/w4a4/codes/2',
    ]  # fmt: skip
    assert main([*options, 'ops/weights/nix']) == 1
    assert 'ops/weights/nix: missing' in capsys.readouterr().err
    lines = (tmp_path / 'results.jsonl').read_text().splitlines()
    rows = {row['arm']: row for row in map(json.loads, lines)}
    good = rows.pop('step/r18/w4a4/codes/2')
    assert good['ms'] > 0 and good['first_loss'] > 0
    assert "KeyError: 'nix'" in rows['ops/weights/nix']['error']
    assert '## Training steps' in (tmp_path / 'table.md').read_text()
    assert main(options) == 0
    assert len((tmp_path / 'results.jsonl').read_text().splitlines()) == 2


def test_the_list(capsys):
    assert main(['--list', '--only', 'scaling/r18/*', 'loader/*']) == 0
    names = capsys.readouterr().out.split()
    assert names[:3] == ['loader/r18/1', 'loader/r18/2', 'loader/r18/all']
    assert names[3] == 'loader/r18/1/opencv-stacked'
    assert names[8] == 'scaling/r18/aux/plain/256/1'


@pytest.mark.parametrize(
    'arguments, line',
    [
        (['--only', 'nix'], "got 'nix'"),
        (['--only', 'loader/r18/1/dali'], 'the decoder dali needs '),
        (['--jobs', '0'], 'argument --jobs: expected an integer from 1'),
        (['--repeats', 'x'], 'argument --repeats: expected an integer from 1'),
        (['--nix'], 'unrecognized arguments: --nix (see python -m benchmarks'),
    ],
)
def test_bad_options_are_one_line(arguments, line, capsys):
    assert main(arguments) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith('error: ') and line in error
