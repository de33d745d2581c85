"""The digits recipe through the real commands."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch

from mmauxq.checkpoint_file import read_checkpoint
from tests.commands import evaluate, train
from tests.conftest import ROOT, process_environment
from tests.support import killing

RECIPE = ROOT / 'configs/aux_r20_w2a2_digits.py'
ONE_EPOCH = ('train_cfg.max_epochs=1', 'param_scheduler.T_max=1')


def run(*words):
    return subprocess.run(
        [str(word) for word in words], env=process_environment(),
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


def top1(text):
    """The last validation accuracy that a log names."""
    return float(text.rpartition('accuracy/top1: ')[2].split()[0])


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(), reason='for machines without a GPU'
)
def test_two_processes_train_and_the_slim_network_is_what_they_logged(
    tmp_path, capfd
):
    """``tools/dist_train.sh configs/aux_r20_w2a2_digits.py 2``, as it is."""
    done = run(
        'bash', ROOT / 'tools/dist_train.sh', RECIPE, 2,
        '--work-dir', tmp_path, '--cfg-options', *ONE_EPOCH,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    logged = top1(done.stdout + done.stderr)
    tested = run(
        'bash', ROOT / 'tools/dist_test.sh', RECIPE, tmp_path / 'slim.pth', 2,
        '--work-dir', tmp_path / 'test',
    )  # fmt: skip
    assert tested.returncode == 0, tested.stderr[-3000:]
    words = [RECIPE, tmp_path / 'epoch_1.pth', '--work-dir', tmp_path / 'test']
    assert evaluate([str(word) for word in words]) == 0
    for out in (tested.stdout, capfd.readouterr().out):
        metrics = json.loads(out.splitlines()[-1])
        assert metrics['accuracy/top1'] == pytest.approx(logged, abs=1e-4)
    # of 1,198 images, 64 in a step of each process
    checkpoint = read_checkpoint(tmp_path / 'epoch_1.pth')
    assert checkpoint['meta']['iter'] == 10
    state = read_checkpoint(tmp_path / 'slim.pth')['state_dict']
    assert not any('guidance' in name for name in state)
    flags = [v for k, v in state.items() if k.endswith('calibrated')]
    assert len(flags) == 40 and all(flags)


@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_a_killed_run_is_resumed(tmp_path):
    log = tmp_path / 'log'
    words = [
        RECIPE, '--work-dir', tmp_path, '--cfg-options',
        'param_scheduler.T_max=100', 'model.architecture.backbone.depth=8',
        f'experiment_name=killed_{time.time_ns()}',
    ]  # fmt: skip
    # so many that it is still at work when the kill arrives
    pid = killing.fork_train([*words, 'train_cfg.max_epochs=100'], log)
    pointer, limit = tmp_path / 'last_checkpoint', time.time() + 1200
    while not pointer.exists() and time.time() < limit:
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert pointer.exists() and not (tmp_path / 'slim.pth').exists()
    kept = read_checkpoint(pointer.read_text())
    epoch = kept['meta']['epoch']
    log.unlink()
    status = killing.run_train(
        [*words, f'train_cfg.max_epochs={epoch + 1}', '--resume'], log
    )
    text = log.read_text()
    assert status == 0, text[-3000:]
    assert f'resumed epoch: {epoch}' in text
    # calibrated already: nothing to warn of, nothing done again
    assert 'WITHOUT A FLOAT CHECKPOINT' not in text
    last = read_checkpoint(tmp_path / f'epoch_{epoch + 1}.pth')
    assert last['meta']['epoch'] == epoch + 1
    assert last['meta']['iter'] == (epoch + 1) * kept['meta']['iter'] // epoch
    assert (tmp_path / 'slim.pth').exists()


@pytest.mark.parametrize(
    'option, message',
    [
        (
            'model.guidance.taps=backbone.layer9.*',
            "got 'backbone.layer9.*', which matches nothing",
        ),
        (
            'model.policy.layers="[(backbone.nothing,8)]"',
            "got 'backbone.nothing', which matches nothing",
        ),
        ('model.policy.layers=7', 'policy.layers: expected a dict or'),
        (
            'model.quantizers.weight.bits=11',
            'quantizers.weight: expected bits from 1 to 8',
        ),
        (
            'model.guidance.width_ratio=2',
            'width_ratio: expected a number above 0',
        ),
        ('model.guidance.loss_wieght=2', 'loss_wieght'),
        ('model.input_shape=(3,8,8)', 'a forward pass on (1, 3, 8, 8) fails'),
        ('model.float_checkpoint=nowhere.pth', 'nowhere.pth'),
        ('model.architecture.head=None', 'no head'),
    ],
)
def test_wrong_settings_end_in_one_line(tmp_path, capfd, option, message):
    # MMEngine keeps its singletons under the name of the experiment
    name = f'experiment_name=wrong_{time.time_ns()}'
    words = [str(RECIPE), '--work-dir', str(tmp_path)]
    words += ['--cfg-options', option, name]
    assert train(words) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith('error: ')]
    assert len(errors) == 1 and message in errors[0], errors
    assert 'Traceback' not in '\n'.join(lines)
    assert not list(tmp_path.glob('*.pth'))


def one_error(capfd, *words):
    """Runs a training that must fail in one line; returns the line."""
    name = f'experiment_name=wrong_{time.time_ns()}'
    assert train([*map(str, words), '--cfg-options', name]) == 2
    err = capfd.readouterr().err
    (line,) = [x for x in err.splitlines() if x.startswith('error: ')]
    assert 'Traceback' not in err
    return line


def test_a_teacher_that_guesses_is_refused_before_training(tmp_path, capfd):
    """Without a float start, the teacher would be F with random weights."""
    line = one_error(
        capfd, ROOT / 'configs/kd_r20_w2a2_digits.py', '--work-dir', tmp_path
    )
    assert (
        'CIFARResNet, as F in float: expected top-1 of at least '
        'guidance.least_accuracy=19, got top-1 '
    ) in line
    assert not list(tmp_path.glob('*.pth'))


def test_only_joint_training_is_compiled(tmp_path, capfd):
    line = one_error(
        capfd, ROOT / 'configs/float_r20_digits.py', '--work-dir', tmp_path,
        '--compile',
    )  # fmt: skip
    assert '--compile: expected a recipe of mmauxq.JointQAT, got' in line
