"""How commands end."""

import pytest

from mmauxq.cli import run_command
from mmauxq.errors import TrainingError, UsageError, one_line


@pytest.mark.parametrize(
    'variables, said',
    [
        ({}, 'error: it broke\n'),
        (dict(RANK='0'), 'error: it broke\n'),
        (dict(RANK='3'), 'error: (rank 3) it broke\n'),
        (dict(SLURM_PROCID='2'), 'error: (rank 2) it broke\n'),
    ],
)
def test_ranks_name_themselves(monkeypatch, capsys, variables, said):
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run_command, 'RANK_PATIENCE', 0)
    run_command._print_error('it broke')
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    'error, line',
    [
        (UsageError('a\n  b'), 'a b'),
        (TrainingError('it ended'), 'it ended'),
        (KeyError('lr'), "missing key 'lr'"),
        (KeyError('no lr in it'), 'no lr in it'),
        (ValueError('x'), 'ValueError: x'),
        (ValueError('x' * 700), 'ValueError: ' + 'x' * 585 + '...'),
    ],
)
def test_errors_are_one_line(error, line):
    assert one_line(error) == line
