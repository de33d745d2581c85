"""What is measured of a run on the way."""

import itertools
import json
import math
import time

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import log_processor

from mmauxq.compare import training_run as trial
from mmauxq.compare.records import read_result
from mmauxq.errors import TrainingError
from tests.compare.conftest import record
from tests.conftest import ROOT
from tests.running import make_runner
from tests.support.file_operations import killed_at


class Work(Hook):
    """What a step does, before anybody looks at it."""

    priority = 'VERY_HIGH'

    def __init__(self, act):
        self.act = act

    def after_train_iter(self, runner, **kwargs):
        self.act(runner.iter)


def watched(work_dir, act, **settings):
    runner = make_runner(work_dir, **settings)
    progress = trial._Progress(lambda done, of: None, 'accuracy/top1')
    runner.register_hook(progress)
    runner.register_hook(Work(act))
    return runner, progress


def test_memory_is_read_before_the_log_sets_its_count_back(
    tmp_path, monkeypatch
):
    """The log is MMEngine's own; the count is that of a feigned GPU."""
    count = {'bytes': 0, 'resets': 0}

    def reset(*args):
        count.update(bytes=0, resets=count['resets'] + 1)

    def allocate(step):
        count['bytes'] = 700 if step == 0 else 300

    runner, progress = watched(tmp_path, allocate)
    monkeypatch.setattr(log_processor, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(
        torch.cuda, 'max_memory_allocated', lambda *args, **kw: count['bytes']
    )
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', reset)
    runner.train()
    assert count == dict(bytes=0, resets=4)
    assert progress.peak_memory == 700


def test_a_resumed_run_counts_the_seconds_before_its_checkpoint(
    tmp_path, monkeypatch
):
    now = {'seconds': 5.0}

    def work(step):
        now['seconds'] += 10

    monkeypatch.setattr(time, 'perf_counter', lambda: now['seconds'])
    runner, first = watched(tmp_path, work)
    runner.train()
    assert first.steps == [10.0] * 4
    assert runner.message_hub.get_info(trial.SECONDS) == 40.0
    now['seconds'] += 1000  # the time that it lies dead
    runner, second = watched(
        tmp_path,
        work,
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=2),
        resume=True,
        load_from=str(tmp_path / 'epoch_1.pth'),
    )
    runner.train()
    assert second.steps == [10.0] * 4
    assert runner.message_hub.get_info(trial.SECONDS) == 80.0
    assert second.seconds == 80.0


def test_the_runner_formats_its_config_once(tmp_path, monkeypatch):
    """MMEngine asks for the text six times, which would be most of a run."""
    plain, formatted = Config.pretty_text.fget, []

    def counted(self):
        formatted.append(1)
        return plain(self)

    def from_cfg(config):
        assert config.pretty_text == config.pretty_text
        raise TrainingError('begun')

    monkeypatch.setattr(Config, 'pretty_text', property(counted))
    monkeypatch.setattr(trial.Runner, 'from_cfg', from_cfg)
    config = Config.fromfile(ROOT / 'configs/qat_r8_w2a2_digits.py')
    with pytest.raises(TrainingError, match='begun'):
        trial.run_trial(config, tmp_path, 0)
    assert len(formatted) == 1


def feign(monkeypatch, file='epoch_1.pth', accuracy=50.0):
    """Runs that take no time."""

    def run_trial(config, folder, seed, report, resume, metric):
        report(1, 1)
        (folder / file).touch()
        (folder / 'last_checkpoint').write_text(f'/somewhere/else/{file}')
        config.work_dir = str(folder)
        return trial.Trial([accuracy], 1.0, 0.1, 700, {}, {}, config)

    monkeypatch.setattr(trial, 'run_trial', run_trial)
    monkeypatch.setattr(trial, 'commit', lambda: None)


def test_the_end_of_a_run_that_is_killed_at_any_moment(tmp_path, monkeypatch):
    """A result is there only with the checkpoint that other arms start from;
    the same run leaves nothing of the killed one."""
    for number in itertools.count():
        folder = tmp_path / str(number) / 'plain' / '0'
        folder.mkdir(parents=True)
        Config(dict(model=dict(type='x'))).dump(folder / 'recipe.py')
        (folder / 'last.pth').symlink_to('epoch_0.pth')
        feign(monkeypatch)
        if not killed_at(
            number, folder, lambda folder=folder: trial.run_one(folder, 0)
        ):
            break
        result, last = folder / 'result.json', folder / 'last.pth'
        assert last.readlink().name in ('epoch_0.pth', 'epoch_1.pth')
        if result.exists():
            assert read_result(result)['final'] == 50.0
            assert last.readlink().name == 'epoch_1.pth' and last.is_file()
        trial.run_one(folder, 0)
        assert read_result(result)['final'] == 50.0
        assert not list(folder.glob('*.part'))
    assert number > 10


def test_a_result_that_would_not_be_believed_is_not_written(
    tmp_path, monkeypatch
):
    Config(dict(model=dict(type='x'))).dump(tmp_path / 'recipe.py')
    feign(monkeypatch, accuracy=math.nan)
    with pytest.raises(ValueError, match='the result: final: expected a numb'):
        trial.run_one(tmp_path, 0)
    assert not (tmp_path / 'result.json').exists()


def test_the_last_checkpoint_is_one_of_the_run(tmp_path):
    """Wherever the pointer says that it is."""
    config = Config(dict(work_dir=str(tmp_path)))
    done = trial.Trial([50.0], 1.0, 0.1, 700, {}, {}, config)
    with pytest.raises(TrainingError, match='names no last checkpoint'):
        _ = done.last_checkpoint
    (tmp_path / 'epoch_2.pth').touch()
    (tmp_path / 'last_checkpoint').write_text('/somewhere/else/epoch_2.pth\n')
    assert done.last_checkpoint == tmp_path / 'epoch_2.pth'


@pytest.mark.parametrize('shared', [False, True])
def test_where_a_run_was_is_recorded(tmp_path, monkeypatch, shared):
    """The GPU is feigned; its memory is reported while the run goes on."""
    config = Config(dict(model=dict(type='x')))
    config.dump(tmp_path / 'recipe.py')
    reports = []

    def run_trial(config, folder, seed, report, resume, metric):
        for step in (9, 10):
            report(step, 20)
            file = folder / 'memory'
            reports.append(file.read_text() if file.exists() else None)
        if shared:  # as the comparison does when another run comes
            (folder / 'shared').touch()
        (folder / 'last_checkpoint').write_text('epoch_1.pth')
        config.work_dir = str(folder)
        return trial.Trial([50.0], 1.0, 0.1, 700, {}, {}, config)

    monkeypatch.setattr(trial, 'run_trial', run_trial)
    for name, value in dict(
        is_available=True,
        mem_get_info=(700, 1000),
        memory_reserved=200,
        get_device_name='NVIDIA H100',
    ).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    trial.run_one(tmp_path, 0)  # in a folder of any name
    assert reports == [None, '700 200']
    found = json.loads((tmp_path / 'result.json').read_text())
    assert (found['gpu'], found['shared']) == ('NVIDIA H100', shared)


def test_the_final_metric_of_the_float_network_is_recorded(
    tmp_path, monkeypatch
):
    """Where the start is the checkpoint of another run of a comparison."""
    start = tmp_path / 'float' / '3' / 'last.pth'
    start.parent.mkdir(parents=True)
    (tmp_path / 'recipe.py').write_text("model = dict(type='mmauxq.JointQAT')")
    feign(monkeypatch)

    def float_final(start, metric='accuracy/top1'):
        trial.run_one(tmp_path, 0, metric, start)
        return json.loads((tmp_path / 'result.json').read_text())[
            'float_final'
        ]

    assert float_final(None) is None
    assert float_final(str(start)) is None
    feigned = record('float', 3, 97.5, metric='accuracy/top1')
    start.with_name('result.json').write_text(json.dumps(feigned))
    assert float_final(str(start)) == 97.5
    assert float_final(str(start), 'another') is None
