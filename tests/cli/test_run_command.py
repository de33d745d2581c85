"""How commands end."""

import pytest

from mmauxq.cli import run_command


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
