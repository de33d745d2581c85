"""The real command: killed, continued, and shown again."""

import json
import logging
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from mmengine.config import Config
from rich.progress import Progress

from mmauxq.cli import compare
from mmauxq.compare import comparison
from mmauxq.compare.placement import Run
from tests.commands import compare_command
from tests.compare.conftest import record
from tests.conftest import ROOT, process_environment

COMMAND = [
    sys.executable,
    str(ROOT / 'tools/compare.py'),
    '--seeds', '0',
    '--float', str(ROOT / 'configs/float_r8_digits.py'),
    '--arms',
    f'plain={ROOT / "configs/qat_r8_w2a2_digits.py"}',
    f'aux={ROOT / "configs/aux_r8_w2a2_digits.py"}',
    '--cfg-options', 'train_cfg.max_epochs=1', 'param_scheduler.T_max=1',
]  # fmt: skip

QAT = ROOT / 'configs/qat_r8_w2a2_digits.py'

TUNE = ['--arms', f'a={QAT}', '--out', 'x']
TUNE += ['--tune', 'optim_wrapper.optimizer.lr=1,2']

HANGS = 600
"""Seconds after which a process is taken to hang. How fast it is depends on
what else runs."""


@pytest.mark.slow
def test_killed_and_continued(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out'
    words = [*COMMAND, '--out', str(out)]
    process = subprocess.Popen(
        words, env=process_environment(), stderr=subprocess.DEVNULL
    )
    first = out / 'float/runs/float/0/result.json'
    limit = time.time() + HANGS
    while not first.exists() and time.time() < limit:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(HANGS) == 130
    before = first.read_text()
    # in this process, but for the runs, which have their own
    for name, value in process_environment().items():
        monkeypatch.setenv(name, value)
    # two that are feigned: each arm has one of its own
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert compare_command(words[2:]) == 0
    done = capsys.readouterr().out
    assert first.read_text() == before  # not trained again
    records = [
        json.loads(line)
        for line in (out / 'results.jsonl').read_text().splitlines()
    ]
    assert {(r['arm'], r['seed']) for r in records} == {
        ('plain', 0),
        ('aux', 0),
    }
    assert all(r['start'].endswith('0/last.pth') for r in records)
    assert [(r['gpu'], r['shared']) for r in records] == [(None, False)] * 2
    plain, aux = records
    assert plain['cost']['guidance_multiply_adds'] == 0
    assert aux['cost']['guidance_multiply_adds'] > 0
    assert set(plain['gradients']) == {'student'}
    assert set(aux['gradients']) == {'student', 'joint'}
    assert (out / 'gradients.png').is_file()
    assert compare_command(['--table', str(out)]) == 0
    # the reference is the first arm of the folder there
    again = capsys.readouterr().out
    assert again.count('|') == done.count('|')
    words = ['--map', str(out), str(out), '--together', '--out', str(out)]
    assert compare_command(words) == 0
    both = capsys.readouterr().out
    assert (out / 'map.md').read_text() in both
    assert both.count('| aux |') == 3  # in each, and together
    assert '| aux | 2 |' in both
    assert (out / 'map.png').is_file()


def test_the_bars_say_where_each_run_is(tmp_path, monkeypatch):
    runs = [Run('aux', seed, tmp_path / str(seed)) for seed in (3, 4)]
    steps = [{runs[0]: 'gpu 1', runs[1]: ''}, {}]
    monkeypatch.setattr(comparison, 'train', lambda *args: iter(steps))
    names = []
    add = Progress.add_task

    def add_task(self, name, **kwargs):
        names.append(name)
        return add(self, name, **kwargs)

    monkeypatch.setattr(Progress, 'add_task', add_task)
    compare._watch(runs, 'arms x seeds', 1, None, ['0', '1'])
    assert names == ['arms x seeds', '  aux 3  gpu 1', '  aux 4']


def feign_training(monkeypatch, trained):
    """Runs that take no time, and are best at a learning rate of 0.1; with
    the module, at 0.02."""

    def train(runs, jobs, start, gpus, metric, may_diverge):
        assert may_diverge == (start is not None)  # of the float networks
        for run in runs:
            if run.result.is_file():
                continue
            trained.append((run.name, start))
            config = Config.fromfile(run.folder / 'recipe.py')
            rate = config.optim_wrapper.optimizer.lr
            final = 90 - 50 * abs(rate - (0.02 if run.arm == 'aux' else 0.1))
            content = record(run.arm, run.seed, final)
            run.result.write_text(json.dumps(content))
        yield {}

    monkeypatch.setattr(comparison, 'train', train)


def test_each_arm_takes_the_value_that_is_best_on_held_out_images(
    tmp_path, monkeypatch, capsys
):
    trained: list = []
    feign_training(monkeypatch, trained)
    key = 'optim_wrapper.optimizer.lr'
    words = [*COMMAND[2:], '--out', str(tmp_path), '--hold-out', '300']
    words += ['--tune', f'{key}=0.02,0.05,0.1,0.2']
    place = words.index('--arms') + 2
    aux = words.pop(place)
    assert compare_command(words) == 0
    first = ['float 0', 'float 1000', f'plain {key}=0.02 1000']
    assert [name for name, _ in trained[:3]] == first
    assert trained[-1][0] == 'plain 0'
    inner, outer = (
        str(tmp_path / f'{part}float/runs/float/{{seed}}/last.pth')
        for part in ('tune/', '')
    )
    assert {start for _, start in trained} == {None, inner, outer}
    capsys.readouterr()

    del trained[:]
    words.insert(place, aux)  # the plain one is not tuned again
    assert compare_command(words) == 0
    shown = capsys.readouterr().out
    assert len(trained) == 5 and trained[-1] == ('aux 0', outer)
    assert '| plain | 86.00 | 87.50 | 90.00 | 85.00 | 0.1 |' in shown
    assert '| aux | 90.00 | 88.50 | 86.00 | 81.00 | 0.02 |' in shown
    assert shown.count('warning') == 2
    assert (tmp_path / 'table.md').read_text() in shown
    described = json.loads((tmp_path / 'comparison.json').read_text())
    assert described['chosen'] == dict(plain=0.1, aux=0.02)
    for arm, rate in described['chosen'].items():
        config = Config.fromfile(tmp_path / f'runs/{arm}/0/recipe.py')
        assert config.optim_wrapper.optimizer.lr == rate
        assert config.train_dataloader.dataset.dataset.type == 'mmauxq.Digits'
    assert compare_command(['--table', str(tmp_path)]) == 0
    # the first test of a process has the log on its output, above the table
    shown = shown[shown.index('| arm |') :]
    assert capsys.readouterr().out == shown

    for word, message in (
        (f'{key}=0.1,0.2', '--tune'),
        (
            str(ROOT / 'configs/float_r8_digits.py') + ',log_level=DEBUG',
            '--float',
        ),
        ('train_cfg.max_epochs=2', '--cfg-options'),
    ):
        other = list(words)
        start = word.partition('=')[0].partition(',')[0]
        (place,) = (i for i, w in enumerate(words) if w.startswith(start))
        other[place] = word
        assert compare_command(other) == 2
        assert f'was begun with {message} ' in capsys.readouterr().err


def test_checkpoints_that_may_have_seen_the_held_out_images_are_named(
    tmp_path, monkeypatch, capsys
):
    feign_training(monkeypatch, [])
    trained = ROOT / 'configs/checkpoints/float_r8_digits.pth'
    arm = f'kd={ROOT}/configs/kd_r20_w2a2_digits.py'
    arm += ',model.architecture.backbone.depth=8'
    words = ['--seeds', '0', '--out', str(tmp_path), '--hold-out', '1000']
    words += ['--tune', 'optim_wrapper.optimizer.lr=0.02,0.1']
    words += ['--float', str(trained), '--arms', arm]
    assert compare_command(words) == 0
    (line,) = re.findall('warning: .* held out;', capsys.readouterr().err)
    assert line.startswith(f'warning: --float: {trained} may have seen')
    words[-1] += f',model.guidance.checkpoint={trained}'
    words[3] = str(tmp_path / 'second')
    assert compare_command(words) == 0
    lines = re.findall('warning: .* held out;', capsys.readouterr().err)
    assert len(lines) == 2
    assert f"arm 'kd': model.guidance.checkpoint: {trained} may" in lines[1]


@pytest.mark.parametrize(
    'words, message',
    [
        ([], 'expected --arms and --out, or --map and --out, or'),
        (['--map', 'a'], 'expected --arms and --out, or --map and'),
        (['--map', 'a', '--out', 'x'], 'a holds no finished run'),
        (['--table', '.', '--together'], '--together: expected beside --map'),
        (['--arms', 'a=b.py', '--out', 'x'], 'config b.py does not exist'),
        (['--table', '.'], 'no finished run'),
        (['--table', '.', '--map', '.'], 'expected --arms and --out, or'),
        (
            ['--arms', 'a=b.py', '--out', 'file'],
            '--out: expected a folder, got the file file',
        ),
        (
            ['--map', '.', '--out', 'link'],
            '--out: expected a folder, got the dangling link link',
        ),
        (
            ['--map', 'damaged', '--out', 'x'],
            'results.jsonl, line 1: expected',
        ),
        (['--table', 'damaged'], 'results.jsonl, line 1: expected JSON'),
        (
            ['--arms', f'a={QAT}', '--out', 'x', '--seeds', '1', '1'],
            '--seeds: 1 is given twice',
        ),
        (['--arms', '..=b.py', '--out', 'x'], "begins with no dot, got '..'"),
        (['--arms', 'a=bad.py', '--out', 'x'], "arm 'a': config bad.py: "),
        (
            ['--arms', 'a=b.py', '--out', 'x', '--jobs', '0'],
            "--jobs: expected an integer from 1, got '0'",
        ),
        (
            ['--arms', 'a=b.py', '--out', 'x', '--gpus', '-1'],
            "--gpus: expected an integer from 0, got '-1'",
        ),
        (
            ['--arms', f'a={QAT}', '--out', 'x', '--hold-out', '5'],
            '--hold-out: expected beside --tune',
        ),
        (
            ['--arms', f'a={QAT}', '--out', 'x', '--tune-seeds', '5'],
            '--tune-seeds: expected beside --tune',
        ),
        (
            ['--table', '.', '--tune', 'model.a=1,2'],
            '--tune: expected beside --arms',
        ),
        (
            [*TUNE, '--hold-out', '0'],
            "--hold-out: expected an integer from 1, got '0'",
        ),
        (TUNE, '--hold-out: HeldOut: count: expected less than 1198, the num'),
        (
            [*TUNE, '--tune-seeds', '5', '2'],
            '--tune-seeds: expected none of --seeds, got 2',
        ),
        (
            ['--arms', 'a=b.py', '--out', 'x', '--gpus', '3'],
            '--gpus: expected at most 2, as many as are visible, got 3',
        ),
    ],
)
def test_wrong_use_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to('nowhere')
    (tmp_path / 'damaged').mkdir()
    (tmp_path / 'damaged/results.jsonl').write_text('{"arm": ')
    (tmp_path / 'bad.py').write_text('model = (')
    assert compare_command(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_an_arm_that_cannot_be_built_is_named(tmp_path, monkeypatch, capfd):
    # MMEngine's logger keeps the output stream of the test before
    monkeypatch.setattr(logging, 'raiseExceptions', False)
    arm = f'a={ROOT / "configs/aux_r20_w2a2_digits.py"}'
    words = ['--arms', f'{arm},model.guidance.taps=backbone.none']
    assert compare_command([*words, '--out', str(tmp_path / 'out')]) == 2
    lines = [
        line
        for line in capfd.readouterr().err.splitlines()
        if ' - mmengine - ' not in line
    ]
    assert len(lines) == 1
    assert "arm 'a': guidance.taps: expected a pattern of names" in lines[0]
