"""Signals, and launchers that are gone."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mmauxq import stopping
from mmauxq.stopping import Stopped, stoppable
from tests.conftest import process_environment

KINDS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture(autouse=True)
def same_handler_of_children():
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


def wait_for(condition, seconds=60):
    """How long it takes is up to the machine."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize('kind, status', KINDS)
def test_a_signal_is_an_exception_of_its_own(kind, status):
    before = [signal.getsignal(k) for k, _ in KINDS]
    with pytest.raises(Stopped) as stopped, stoppable():
        try:
            os.kill(os.getpid(), kind)
            time.sleep(60)
        except Exception:  # as libraries do
            pytest.fail('taken for an error')
    assert stopped.value.status == status
    assert stopped.value.line('train') == (
        f'stopped by {kind.name}; go on with --resume'
    )
    assert stopped.value.line('audit') == f'stopped by {kind.name}'
    assert [signal.getsignal(k) for k, _ in KINDS] == before


def test_an_error_that_a_signal_was_turned_into_is_still_the_signal():
    class Name:
        def __set_name__(self, owner, name):  # Python makes a RuntimeError
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    with pytest.raises(Stopped, match='SIGTERM'), stoppable():
        type('Owner', (), dict(name=Name()))


def test_a_signal_in_a_destructor_is_not_lost(capfd):
    class Owner:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    with pytest.raises(Stopped, match='SIGINT'), stoppable():
        owner = Owner()
        del owner
        time.sleep(60)
    assert capfd.readouterr().err == ''


def test_a_signal_that_is_swallowed_comes_again(monkeypatch):
    monkeypatch.setattr(stopping, 'AGAIN', 0.05)
    with pytest.raises(Stopped, match='SIGINT'), stoppable():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except BaseException:
            pass
        time.sleep(60)


@pytest.mark.parametrize('pause, status', [(0, 0), (0.1, 143)])
def test_a_second_signal_ends_the_process_at_once(monkeypatch, pause, status):
    monkeypatch.setattr(stopping, 'TWICE', 60 if not pause else 0.05)
    child = os.fork()
    if not child:
        try:
            with stoppable():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(60)
                finally:
                    time.sleep(pause)
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.01)
        except Stopped:
            os._exit(0)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def test_loader_processes_leave_a_terminals_signal_to_their_owner():
    with stoppable():
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


@pytest.mark.parametrize('kind, status', KINDS)
def test_a_signal_while_the_process_ends(capfd, kind, status):
    child = os.fork()
    if not child:
        stopping.finish()
        os.kill(os.getpid(), kind)
        time.sleep(60)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert capfd.readouterr().err == f'stopped by {kind.name}\n'


def test_another_thread_has_no_signals():
    seen = []

    def work():
        with stoppable() as check:
            check()
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


RANK = """
import os, pathlib, time
from mmauxq.stopping import LAUNCHER, end_with

launcher = int(os.environ[LAUNCHER])
assert launcher == os.getppid()
end_with(launcher)
pathlib.Path(os.environ['RANK']).write_text(str(os.getpid()))
time.sleep(600)
"""


def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    (tmp_path / 'rank.py').write_text(RANK)
    launcher = subprocess.Popen(
        [sys.executable, '-m', 'mmauxq.engine.dist_launch', '2', 'rank.py'],
        cwd=tmp_path,
        env=process_environment(more=dict(CUDA_VISIBLE_DEVICES='')),
    )
    files = [tmp_path / '0', tmp_path / '1']
    try:
        assert wait_for(
            lambda: all(f.exists() and f.read_text() for f in files)
        )
    finally:
        launcher.kill()
        launcher.wait()
    ranks = [int(file.read_text()) for file in files]
    assert wait_for(lambda: not any(map(is_running, ranks)))


def is_running(pid):
    """Whether a process runs; one that nobody waits for does not."""
    words = ['ps', '-o', 'stat=', '-p', str(pid)]
    state = subprocess.run(words, capture_output=True, text=True).stdout
    return state.strip()[:1] not in ('', 'Z')


def test_a_process_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(stopping, 'PATIENCE', 0.05)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stopping.end_with(-1)  # gone already
        time.sleep(60)
        os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9


def test_the_first_import_is_quiet_too(tmp_path, run_python):
    """Before a command can say how it ends."""
    (tmp_path / 'mmengine.py').write_text('raise KeyboardInterrupt')
    done = run_python(
        '-c', 'import mmauxq', env=dict(PYTHONPATH=str(tmp_path))
    )
    assert done.returncode == 130
    assert done.stderr == 'stopped by SIGINT\n'
    code = 'try: import mmauxq\nexcept KeyboardInterrupt: print("mine")'
    done = run_python('-c', code, env=dict(PYTHONPATH=str(tmp_path)))
    assert (done.returncode, done.stdout) == (0, 'mine\n')
