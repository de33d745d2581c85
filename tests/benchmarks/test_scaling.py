"""Several GPUs: names, tables and, on the CPU, that it runs."""

import json
import signal
import sys

import pytest
import torch

from mmauxq.errors import UsageError
from mmauxq.evaluation import benchmark, benchmark_report
from mmauxq.evaluation import benchmark_scaling as scaling
from mmauxq.evaluation.benchmark_steps import write_config
from tests.conftest import process_environment

ARM = 'scaling/r18/w4a4/plain/2'


def row(gpus, rate, **more):
    return dict(
        arm=f'{ARM}/{gpus}', device='a GPU', torch='2', network='r18',
        what='w4a4', form='plain', batch=2, gpus=gpus, ms=2000 * gpus / rate,
        images_per_s=rate, data_ms=0.5, peak_gib=[1.25] * gpus, launch_s=12.3,
        **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    'count, expected',
    [(0, [1, 2]), (1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])],
)
def test_numbers_of_gpus(monkeypatch, count, expected):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: count)
    assert scaling.gpus_here() == expected


def test_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    assert scaling.names([ARM], [1, 4]) == [f'{ARM}/1', f'{ARM}/4']
    assert scaling.names([], [4]) == []
    for arms, gpus, message in (
        ([ARM], [8], '--gpus 8: allowed are 1 to 4'),
        ([ARM], [0], '--gpus 0: allowed are 1 to 4'),
        ([f'{ARM}/4'], [4], 'needed is scaling/NETWORK/WHAT/FORM/BATCH'),
        (['scaling/r18/w4a4/slow/2'], [4], "there is no 'slow'; allowed"),
        (['scaling/r18/float/plain/2'], [4], "there is no 'float'; allowed"),
    ):
        with pytest.raises(UsageError, match=message):
            scaling.names(arms, gpus)


def test_the_recipes_exist(root):
    arms = [n for n in benchmark.ARMS if n.startswith('scaling/')]
    assert 'scaling/r50/kd/plain/256' in arms
    assert len(scaling.names(arms, [1])) == len(arms)
    for name in arms:
        _, network, what, *_ = name.split('/')
        kind = dict(w4a4='qat').get(what, what)
        assert (root / f'configs/{kind}_{network}_w4a4.py').is_file(), name


def test_efficiency_is_that_against_one_process():
    split = dict(
        computing=90.0, all_reduce=4.0, all_reduce_total=20.0, sync_bn=0.0,
        sync_bn_total=0.0, idle=6.0,
    )  # fmt: skip
    files = dict(
        arm='loader/r18/2', network='r18', workers=2, cores=16, device='a GPU',
        images_per_s=700.0, per_worker=350.0, kilobytes=93.0, torch='2',
    )  # fmt: skip
    rows = [
        dict(arm=f'{ARM}/8', error='rank 3 was killed by signal 9'),
        row(1, 1000.0),
        row(8, 7000.0),
        row(8, 7600.0, split=split),
        dict(arm=f'{ARM}/4', error='took more than 300 s'),
        files,
    ]
    text = benchmark_report.markdown(rows)
    line = '| r18, batch 2 | w4a4 | plain | 8 | 2.11 | 7600 | 0.950 | '
    line += (
        f'{" ".join(["1.25"] * 8)} | 0.50 | 90 | 4 of 20 | 0 of 0 | 6 | 12 |'
    )
    assert line in text
    assert '7000' not in text  # measured again
    assert '| r18 | 2 of 16 | 700 | 350 | 93 | 7600 (8) |' in text
    assert 'took more than 300 s' in text
    assert 'signal 9' not in text  # it succeeded since


def test_the_last_words_of_a_run_that_fails(tmp_path):
    script = (
        'print("why")\n'
        'print("error: rank 1 died; the job was stopped")\n'
        'raise SystemExit(3)\n'
    )
    command, log = [sys.executable, '-c', script], tmp_path / 'log'
    assert scaling._run(command, log, 30) == 'why'
    assert scaling._run([sys.executable, '-c', ''], log, 30) is None


def test_a_run_that_hangs_is_ended(tmp_path):
    script = (
        'import signal, sys, time\n'
        'signal.signal(signal.SIGTERM, lambda *a: sys.exit(print("bye")))\n'
        'signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})\n'
        'time.sleep(100)\n'
    )
    log = tmp_path / 'log'
    command = [sys.executable, '-uc', script]
    # it inherits that the signal is held back until it is ready for it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        assert scaling._run(command, log, 1.5) == 'took more than 2 s'
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert log.read_text() == 'bye\n'


def test_runs_stop_when_time_is_up(tmp_path, monkeypatch, capsys):
    def fail(name, out, patience, **settings):
        assert patience <= 60 and settings == dict(steps=4, size=32)
        raise RuntimeError('out of memory')

    monkeypatch.setattr(scaling, 'measure', fail)
    settings = dict(steps=4, size=32)
    assert scaling.run_all(['a'], tmp_path, 1, **settings) == ['a']
    assert benchmark.rows(tmp_path) == [dict(arm='a', error='out of memory')]
    assert scaling.run_all(['a', 'b'], tmp_path, -1, **settings) == []
    assert 'out of time: 2 not started' in capsys.readouterr().out


def test_the_config_of_a_run(tmp_path):
    from mmengine.config import Config

    more = 'custom_hooks = []\n'
    path = write_config(tmp_path, 'r50', 'aux-amp', 4, 80, 32, 2, more)
    cfg = Config.fromfile(path)
    assert cfg.model.guidance.type == 'mmauxq.AuxAdaptorAggregator'
    assert cfg.model.guidance.dtype is None
    assert cfg.model.float_checkpoint is None
    loader = cfg.train_dataloader
    assert (loader.batch_size, loader.dataset.length) == (4, 80)
    assert loader.dataset.type == 'mmauxq.GeneratedImages'
    assert loader.pin_memory and 1 <= loader.num_workers <= 8
    assert cfg.default_hooks.logger.interval == 100
    assert cfg.custom_hooks == [] and cfg.val_cfg is None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='for gloo')
def test_two_processes(tmp_path, monkeypatch, root):
    """With a profile, which says nothing where there is no GPU."""
    for name, value in process_environment(root).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('PYTHON', sys.executable)
    settings = dict(steps=3, batch=None, size=32, profile=1)
    assert scaling.run_all([f'{ARM}/2'], tmp_path, None, **settings) == []
    (found,) = benchmark.rows(tmp_path)
    assert (found['arm'], found['gpus'], found['batch']) == (f'{ARM}/2', 2, 2)
    # rounded to a tenth, which is much where a step takes a second
    assert found['images_per_s'] == pytest.approx(4e3 / found['ms'], abs=0.06)
    assert found['repeats'] == 3 and found['data_ms'] > 0
    assert 0 < found['launch_s'] < found['seconds']
    assert found['split'] is None and found['peak_gib'] is None
    assert benchmark.done(tmp_path) == {f'{ARM}/2'}
    folder = tmp_path / f'{ARM}/2'.replace('/', '-')
    ranks = [
        json.loads((folder / f'rank{r}.json').read_text()) for r in (0, 1)
    ]
    assert all(len(rank['time']) == 3 for rank in ranks)
    assert not list(folder.glob('*.pth'))
