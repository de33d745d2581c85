"""Loader processes that die, a disk that is full."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.utils.data import DataLoader

from mmauxq import compat, files
from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.cli import run_command
from mmauxq.engine import resumable_loops as loops
from mmauxq.errors import TrainingError
from tests.engine.test_resume import write_config
from tests.support import killing

pytestmark = pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')

DYING = """
import os
from mmauxq.datasets import Digits
from mmauxq.registry import DATASETS
from torch.utils.data import get_worker_info


@DATASETS.register_module(name='Dying{name}', force=True)
class Dying(Digits):
    served = 0

    def __getitem__(self, index):
        # the main process looks at the first sample before it trains
        Dying.served += get_worker_info() is not None
        if Dying.served > 2:
            os._exit(1)
        return super().__getitem__(index)
"""


def test_eight_loader_processes_die_one_by_one(tmp_path, monkeypatch):
    name = f'dying_{os.getpid()}'
    (tmp_path / f'{name}.py').write_text(DYING.format(name=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    more = (
        f'custom_imports = dict(imports=[{name!r}])\n'
        'train_dataloader.update(batch_size=1, num_workers=8)\n'
        f'train_dataloader["dataset"]["type"] = "mmauxq.Dying{name}"\n'
    )
    config, log = write_config(tmp_path, 'qat', more), tmp_path / 'log'
    run = [config, '--work-dir', tmp_path / 'run']
    assert killing.run_train(run, log) == 1
    text = log.read_text()
    errors = [s for s in text.splitlines() if s.startswith('error: ')]
    assert len(errors) == 1 and 'Traceback' not in text, text[-2000:]
    assert 'data loader' in errors[0] and 'died' in errors[0]


def lose(process: int, seconds: int) -> None:
    """A loader process dies while the main one does something else."""
    os.kill(multiprocessing.active_children()[process].pid, signal.SIGKILL)
    # in pieces: a signal that reaches another thread interrupts no sleep
    for _ in range(10 * seconds):
        time.sleep(0.1)


def in_a_step() -> None:
    def run_iter(self, *args):
        lose(0, 60)  # torch's handler of the signal ends it

    loops.EpochLoop.run_iter = run_iter


def while_another_is_reported() -> None:
    def run_iter(self, *args):
        raise RuntimeError('DataLoader worker (pid(s) 1) exited')

    complain = run_command._print_error

    def report(message):
        lose(1, 1)
        complain(message)

    loops.EpochLoop.run_iter, run_command._print_error = run_iter, report


@pytest.mark.parametrize('when', [in_a_step, while_another_is_reported])
def test_a_loader_process_that_nobody_waits_for_dies(tmp_path, when):
    # else the processes end with the iteration that fails
    workers = 'num_workers=2, persistent_workers=True'
    more = f'train_dataloader.update(batch_size=8, {workers})\n'
    config, log = write_config(tmp_path, 'qat', more), tmp_path / 'log'
    words = [config, '--work-dir', tmp_path / 'run']
    assert killing.run_train(words, log, when) == 1
    text = log.read_text()
    errors = [s for s in text.splitlines() if s.startswith('error: ')]
    assert len(errors) == 1 and 'Traceback' not in text, text[-2000:]
    assert 'data loader died' in errors[0]


@pytest.mark.parametrize(
    'error',
    [ConnectionResetError(104, 'reset'), EOFError(), FileNotFoundError()],
)
def test_a_process_that_dies_while_its_batch_is_received(error, capsys):
    def get(timeout):
        raise error

    batches = iter(DataLoader(range(4), num_workers=1))
    batches._data_queue = SimpleNamespace(get=get)

    def run(args, started):
        started()
        next(batches)

    command = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    assert run_command.run_command(command, []) == 1
    text = capsys.readouterr().err
    assert text.startswith('error: a process of the data loader died (')
    assert text.count('\n') == 1


@pytest.mark.parametrize(
    'error',
    [
        RuntimeError('Caught RuntimeError in DataLoader worker process'),
        ConnectionResetError(104, 'reset'),
    ],
)
def test_other_errors_are_not_taken_for_a_dead_process(error, capsys):
    def run(args, started):
        started()
        raise error

    command = SimpleNamespace(add_arguments=lambda parser: None, run=run)
    assert run_command.run_command(command, []) == 1
    text = capsys.readouterr().err
    assert 'Traceback' in text and 'died' not in text


def full_disk() -> None:
    """Checkpoints find no room."""

    class Os:
        def __getattr__(self, name):
            return getattr(os, name)

        def fsync(self, file):
            raise OSError(28, 'No space left on device')

    files.os = Os()


def test_full_disk_leaves_the_previous_checkpoint(tmp_path):
    config, log = write_config(tmp_path, 'qat'), tmp_path / 'log'
    run = tmp_path / 'run'
    words = [config, '--work-dir', run]
    assert killing.run_train(words, log, killing.at_step(5)) == -9
    before = (run / 'epoch_1.pth').read_bytes()
    log.unlink()
    words.append('--resume')
    assert killing.run_train(words, log, full_disk) == 1
    errors = [
        s for s in log.read_text().splitlines() if s.startswith('error: ')
    ]
    assert len(errors) == 1 and 'No space left on device' in errors[0]
    assert (run / 'epoch_1.pth').read_bytes() == before
    assert not list(run.glob('*.part'))
    # with room again, it goes on
    assert killing.run_train(words, log) == 0
    assert (run / 'epoch_3.pth').exists()


def test_full_disk_is_named(tmp_path, monkeypatch):
    path = tmp_path / 'a.pth'
    files.write_atomically(path, b'old')

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(TrainingError, match='a.pth cannot be .* No space'):
        files.write_atomically(path, b'new')
    assert path.read_bytes() == b'old'
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


def test_mmengine_writes_through_it(tmp_path, monkeypatch):
    """The checkpoint, the best one, text: all complete or absent."""
    from mmengine.fileio import get_file_backend
    from mmengine.runner import save_checkpoint

    compat.write_files_atomically()
    save_checkpoint({'a': 1}, str(tmp_path / 'a.pth'))
    backend = get_file_backend(str(tmp_path))
    backend.put_text('old', tmp_path / 'a.txt')

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files.os, 'replace', full)
    with pytest.raises(TrainingError):
        save_checkpoint({'a': 2}, str(tmp_path / 'a.pth'))
    with pytest.raises(TrainingError):
        backend.put_text('new', tmp_path / 'a.txt')
    assert read_checkpoint(tmp_path / 'a.pth') == {'a': 1}
    assert Path(tmp_path / 'a.txt').read_text() == 'old'


def test_plain_mmengine_destroys_what_was_there(run_python, tmp_path):
    """If this fails, compat.write_files_atomically can go."""
    code = (
        'import io, builtins\n'
        'from mmengine.fileio import LocalBackend\n'
        'backend = LocalBackend()\n'
        'backend.put(b"old", "a")\n'
        'real = open\n'
        'class Full:\n'
        '    def __init__(self, *a): self.file = real(*a)\n'
        '    def __enter__(self): return self\n'
        '    def __exit__(self, *a): self.file.close()\n'
        '    def write(self, data): raise OSError(28, "full")\n'
        'builtins.open = lambda *a, **k: Full(*a)\n'
        'try: backend.put(b"new", "a")\n'
        'except OSError: pass\n'
        'print(real("a").read())\n'
    )
    assert run_python('-c', code).stdout == '\n'
