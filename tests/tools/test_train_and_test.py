"""The commands on good input, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mmauxq import compat


def test_train_resume_evaluate(tool, project):
    done = tool('train.py', 'config.py', '--work-dir', 'run')
    assert done.returncode == 0, done.stderr
    assert 'Traceback' not in done.stderr
    first = compat.load_checkpoint('run/epoch_1.pth')
    assert first['message_hub']['log_scalars']['train/loss'].data

    done = tool(
        'train.py', 'config.py', '--work-dir', 'run', '--resume',
        '--cfg-options', 'train_cfg.max_epochs=2',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'resumed epoch: 1, iter: 2' in done.stdout + done.stderr
    trained = done.stdout + done.stderr
    second = compat.load_checkpoint('run/epoch_2.pth')
    assert second['meta']['iter'] == 4
    assert second['optimizer']['state'].keys()

    done = tool(
        'test.py', 'config.py', 'run/epoch_2.pth', '--out', 'sub/metrics.json'
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics == json.loads((project / 'sub/metrics.json').read_text())
    # what training logged last
    assert trained.rpartition('accuracy/top1: ')[2].split()[0] == (
        f'{metrics["accuracy/top1"]:.4f}'
    )


def test_help(tool):
    for name in ('train.py', 'test.py'):
        done = tool(name, '--help')
        assert done.returncode == 0
        assert '--work-dir' in done.stdout


def test_amp_without_gpu(project):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    from tests.commands import train

    assert train(['config.py', '--work-dir', 'run', '--amp']) == 0


# MMEngine asks for the autocast type in the old way
@pytest.mark.filterwarnings('ignore:torch.get_autocast_gpu_dtype')
@pytest.mark.gpu
def test_amp(project):
    if not torch.cuda.is_available():
        pytest.skip('needs a GPU')
    from tests.commands import train

    assert train(['config.py', '--work-dir', 'run', '--amp']) == 0
    state = compat.load_checkpoint('run/epoch_1.pth')['optimizer']
    assert 'loss_scaler' in state


def test_two_processes_without_gpu(tool, project):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    done = tool('dist_train.sh', 'config.py', 2, '--work-dir', 'run')
    assert done.returncode == 0, done.stderr
    checkpoint = compat.load_checkpoint('run/epoch_1.pth')
    # 8 images, 4 per process and step
    assert checkpoint['meta']['iter'] == 1
    done = tool('dist_test.sh', 'config.py', 'run/epoch_1.pth', 2)
    assert done.returncode == 0, done.stderr
    assert 'accuracy/top1' in json.loads(done.stdout.splitlines()[-1])


def test_distributed_set_up_error_is_one_line(tool):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    done = tool('dist_train.sh', 'config.py', 2, '--resume', 'none.pth')
    assert done.returncode == 2
    assert done.stderr == 'error: checkpoint none.pth does not exist\n'


def test_dead_rank_ends_the_job(tool, project):
    if torch.cuda.is_available():
        pytest.skip('for machines without a GPU')
    with (project / 'toyset.py').open('a') as file:
        file.write('import os\n')
        file.write('ToySet.__len__ = lambda s: os.kill(os.getpid(), 9) '
                   'if os.environ["RANK"] == "1" else 8\n')  # fmt: skip
    done = tool('dist_train.sh', 'config.py', 2, '--work-dir', 'run')
    assert done.returncode == 1
    assert 'error: rank 1 was killed by signal 9' in done.stderr


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
def test_gpus_is_no_positive_integer(tool, gpus):
    done = tool('dist_train.sh', 'config.py', gpus)
    assert done.returncode == 2
    assert done.stderr == (
        f'error: GPUS must be a positive integer, not {gpus!r}\n'
    )


def test_more_gpus_than_there_are(monkeypatch):
    from mmauxq.engine.dist_launch import check_gpus
    from mmauxq.errors import UsageError

    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert check_gpus('2') == 2
    with pytest.raises(UsageError, match='GPUS is 3, but this machine has 2'):
        check_gpus('3')


def test_a_job_that_is_told_to_stop_says_so_in_one_line(monkeypatch, capsys):
    import signal

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException

    from mmauxq.engine import dist_launch

    def stopped(args):
        assert args.nproc_per_node == '3'
        raise SignalException('Process 1 got signal', signal.SIGTERM)

    monkeypatch.setattr(run, 'run', stopped)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert dist_launch.main(['3', 'train.py', 'config.py']) == 143
    assert capsys.readouterr().err == 'error: signal 15 stopped the job\n'


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
