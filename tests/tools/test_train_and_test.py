"""The commands on good input, and how their processes end."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch

from mmauxq.checkpoint_file import read_checkpoint
from mmauxq.engine import dist_launch
from mmauxq.errors import UsageError
from tests.commands import evaluate, train


def test_train_resume_evaluate(tool, project, capfd):
    done = tool('train.py', 'config.py', '--work-dir', 'run')
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    first = read_checkpoint('run/epoch_1.pth')
    assert first['message_hub']['log_scalars']['train/loss']['log'].tolist()

    words = ['config.py', '--work-dir', 'run', '--resume']
    assert train([*words, '--cfg-options', 'train_cfg.max_epochs=2']) == 0
    trained = ''.join(capfd.readouterr())
    assert 'resumed epoch: 1, iter: 2' in trained
    second = read_checkpoint('run/epoch_2.pth')
    assert second['meta']['iter'] == 4
    assert second['optimizer']['state'].keys()

    words = ['config.py', 'run/epoch_2.pth', '--out', 'sub/metrics.json']
    assert evaluate(words) == 0
    metrics = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert metrics == json.loads((project / 'sub/metrics.json').read_text())
    # what training logged last
    assert trained.rpartition('accuracy/top1: ')[2].split()[0] == (
        f'{metrics["accuracy/top1"]:.4f}'
    )


def test_no_loader_process_outlives_a_command(project):
    persistent = [
        f'{part}_dataloader.{option}'
        for part in ('train', 'val', 'test')
        for option in ('num_workers=1', 'persistent_workers=True')
    ]
    before = set(multiprocessing.active_children())
    words = ['--work-dir', 'run', '--cfg-options', *persistent]
    assert train(['config.py', *words]) == 0
    assert set(multiprocessing.active_children()) <= before
    assert evaluate(['config.py', 'run/epoch_1.pth', *words]) == 0
    assert set(multiprocessing.active_children()) <= before


def test_help(tool):
    for name in ('train.py', 'test.py'):
        done = tool(name, '--help')
        assert done.returncode == 0
        assert '--work-dir' in done.stdout


def test_amp_without_gpu(project):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    assert train(['config.py', '--work-dir', 'run', '--amp']) == 0


# MMEngine asks for the autocast type in the old way
@pytest.mark.filterwarnings('ignore:torch.get_autocast_gpu_dtype')
@pytest.mark.gpu
def test_amp(project):
    if not torch.cuda.is_available():
        pytest.skip('needs a GPU')
    assert train(['config.py', '--work-dir', 'run', '--amp']) == 0
    state = read_checkpoint('run/epoch_1.pth')['optimizer']
    assert 'loss_scaler' in state


def test_distributed_set_up_error_is_one_line(tool):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    done = tool('dist_train.sh', 'config.py', 2, '--resume', 'none.pth')
    assert done.returncode == 2
    assert done.stderr == 'error: checkpoint none.pth does not exist\n'


def test_dead_rank_ends_the_job(root, project):
    """Whatever the others are doing."""
    program = project / 'program.py'
    program.write_text(
        'import os, time\n'
        'if os.environ["RANK"] == "1": os.kill(os.getpid(), 9)\n'
        'time.sleep(1200)\n'
    )
    done = subprocess.run(
        [sys.executable, '-m', 'mmauxq.engine.dist_launch', '2', program],
        env={**os.environ, 'PYTHONPATH': str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 1
    assert done.stderr == (
        'error: rank 1 was killed by signal 9; the job was stopped\n'
    )


def test_rank_that_dies_in_training_ends_the_job(tool, project):
    """At once, and not when the others have waited for half an hour."""
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    with (project / 'toyset.py').open('a') as file:
        file.write(
            'import os\n'
            'get = ToySet.__getitem__\n'
            'def dying(self, i):\n'
            '    if i == 7 and os.environ["RANK"] == "1":\n'
            '        open("died", "w").close()\n'
            '        os.kill(os.getpid(), 9)\n'
            '    return get(self, i)\n'
            'ToySet.__getitem__ = dying\n'
        )
    done = tool(
        'dist_train.sh', 'config.py', 2, '--work-dir', 'run',
        '--cfg-options', 'train_dataloader.batch_size=2',
        'find_unused_parameters=True',
    )  # fmt: skip
    # within the time limit of `tool`, which is shorter
    assert (project / 'died').exists(), done.stderr[-2000:]
    assert done.returncode == 1
    assert 'error: rank 1 was killed by signal 9' in done.stderr


@pytest.mark.parametrize('gpus', ['0', '-1', 'two', '1.5', ''])
def test_gpus_is_no_positive_integer(capsys, gpus):
    assert dist_launch.main([gpus, 'train.py', 'config.py']) == 2
    assert capsys.readouterr().err == (
        f'error: GPUS must be a positive integer, not {gpus!r}\n'
    )


def test_gpus_is_handed_on_as_it_is(tool):
    done = tool('dist_train.sh', 'config.py', '')
    assert done.returncode == 2
    assert done.stderr.startswith('error: GPUS must be a positive integer')


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert dist_launch.check_gpus('2') == 2
    with pytest.raises(UsageError, match='GPUS is 3, but this machine has 2'):
        dist_launch.check_gpus('3')


def test_a_job_that_is_told_to_stop_says_so_in_one_line(monkeypatch, capsys):
    import signal

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException

    def stopped(args):
        assert args.nproc_per_node == '3'
        raise SignalException('Process 1 got signal', signal.SIGTERM)

    monkeypatch.setattr(run, 'run', stopped)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert dist_launch.main(['3', 'train.py', 'config.py']) == 143
    assert capsys.readouterr().err == (
        'stopped by SIGTERM; go on with --resume\n'
    )


@pytest.mark.parametrize(
    'name', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh']
)
def test_shell_usage_is_one_line(tool, name):
    done = tool(name)
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: usage: tools/{name} ')
    assert done.stderr.count('\n') == 1


def test_slurm_command(tool, project):
    srun = project / 'bin/srun'
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    path = f'{srun.parent}:/usr/bin:/bin'
    done = tool(
        'slurm_train.sh', 'part', 'job', 'c.py', '16', '--amp', PATH=path
    )
    assert done.returncode == 0, done.stderr
    for word in (
        '-p part',
        '--ntasks=16 --ntasks-per-node=8',
        'c.py --launcher slurm --amp',
    ):
        assert word in done.stdout
    done = tool('slurm_train.sh', 'part', 'job', 'c.py', 'x', PATH=path)
    assert done.returncode == 2


@pytest.mark.parametrize('rank, finalised', [(None, True), ('1', False)])
def test_exit_process(root, rank, finalised):
    """A rank ends at once, after what writes on exit has written."""
    program = (
        'import atexit, threading, time\n'
        'from mmauxq.cli.run_command import exit_process\n'
        'class Late:\n'
        '    def __del__(self): print("late", flush=True)\n'
        'late = Late()\n'
        'atexit.register(print, "written")\n'
        'def work():\n'
        '    time.sleep(0.2)\n'
        '    print("worked")\n'
        'threading.Thread(target=work).start()\n'
        'exit_process(3)\n'
    )
    environment = {**os.environ, 'PYTHONPATH': str(root)}
    environment.pop('RANK', None)
    if rank is not None:
        environment['RANK'] = rank
    done = subprocess.run(
        [sys.executable, '-c', program],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert (
        done.stdout.split() == ['worked', 'written', 'late'][: 2 + finalised]
    )
