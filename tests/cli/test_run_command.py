"""How commands end."""

import errno
import logging
import os
import signal
from types import ModuleType

import pytest

from mmauxq import stopping
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


def command(run):
    """A command that does nothing but ``run``."""
    module = ModuleType('mmauxq.cli.fake')
    module.add_arguments = lambda parser: None
    module.run = run
    return module


@pytest.mark.parametrize('running', [False, True])
@pytest.mark.parametrize('kind', [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_cannot_be_written_is_one_line(capsys, kind, running):
    def run(args, mark_running):
        if running:
            mark_running()
        raise OSError(kind, os.strerror(kind), 'run/scalars.json')

    assert run_command.run_command(command(run), []) == 1
    assert capsys.readouterr().err == (
        f'error: run/scalars.json cannot be written: {os.strerror(kind)}; '
        'files that were complete before are unchanged\n'
    )


def test_three_loader_processes_die_at_once(capsys, monkeypatch):
    """torch raises for the others while the first is reported."""
    died, deaths = 'DataLoader worker (pid(s) 1) exited unexpectedly', []

    def handler(number, frame):
        deaths.append(number)
        raise RuntimeError('DataLoader worker (pid 2) exited unexpectedly')

    def run(args, mark_running):
        mark_running()
        raise RuntimeError(died)

    set_handler = signal.signal
    before = set_handler(signal.SIGCHLD, handler)

    def slowly(kind, new):
        if kind == signal.SIGCHLD and len(deaths) < 2:
            os.kill(os.getpid(), signal.SIGCHLD)
        return set_handler(kind, new)

    monkeypatch.setattr(signal, 'signal', slowly)
    try:
        assert run_command.run_command(command(run), []) == 1
    finally:
        set_handler(signal.SIGCHLD, before)
    assert deaths == [signal.SIGCHLD] * 2
    assert capsys.readouterr().err == (
        f'error: a process of the data loader died ({died}); it may have run '
        'out of memory, of which fewer num_workers need less\n'
    )


@pytest.mark.parametrize('raised', [SystemExit(0), KeyboardInterrupt()])
@pytest.mark.parametrize('running, status', [(False, 2), (True, 1)])
def test_what_leaves_a_command_is_no_success(capsys, raised, running, status):
    def run(args, mark_running):
        if running:
            mark_running()
        raise raised

    assert run_command.run_command(command(run), []) == status
    assert type(raised).__name__ in capsys.readouterr().err


def test_help_is_a_success(capsys):
    with pytest.raises(SystemExit) as leaves:
        run_command.run_command(command(None), ['--help'])
    assert leaves.value.code == 0


def test_a_terminal_obeys_no_error(capsys, caplog):
    def run(args, mark_running):
        logging.getLogger('files').warning('key %s', '\x1b[31m\u202e日本')
        mark_running()
        raise RuntimeError('\x1b[2J\a')

    before = logging.getLogRecordFactory(), logging.raiseExceptions
    assert run_command.run_command(command(run), []) == 1
    said = capsys.readouterr().err
    assert r'key \x1b[31m\u202e日本' in caplog.text
    assert said.endswith('RuntimeError: \\x1b[2J\\x07\n')
    assert before == (logging.getLogRecordFactory(), logging.raiseExceptions)


@pytest.mark.parametrize('swallowed', [False, True])
def test_a_loader_process_repeats_the_signal(monkeypatch, capsys, swallowed):
    """Its end sends it once more, while the children are ended."""

    def run(args, mark_running):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException as error:
            if not swallowed:
                raise
            raise RuntimeError('of a library') from error

    def end_children():
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(stopping, 'end_children', end_children)
    assert run_command.run_command(command(run), []) == 130
    assert capsys.readouterr().err == 'stopped by SIGINT\n'
