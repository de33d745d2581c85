"""What is measured of a run on the way."""

import itertools
from types import SimpleNamespace

from mmengine.hooks import Hook

from mmauxq.compare import training_run as trial
from tests.running import make_runner


def watched(work_dir, **settings):
    runner = make_runner(work_dir, **settings)
    progress = trial._Progress(lambda done, of: None)
    runner.register_hook(progress)
    return runner, progress


def test_memory_is_read_before_the_log_sets_its_count_back(
    tmp_path, monkeypatch
):
    count = {'bytes': 0}
    monkeypatch.setattr(
        trial,
        'torch',
        SimpleNamespace(
            cuda=SimpleNamespace(
                is_available=lambda: True,
                max_memory_allocated=lambda: count['bytes'],
            )
        ),
    )
    runner, progress = watched(tmp_path)

    class Step(Hook):
        priority = 'VERY_HIGH'

        def after_train_iter(self, runner, **kwargs):
            count['bytes'] = 700 if runner.iter == 0 else 300

    class Log(Hook):
        priority = 'BELOW_NORMAL'  # of MMEngine's LoggerHook

        def after_train_iter(self, runner, **kwargs):
            count['bytes'] = 1

    runner.register_hook(Step())
    runner.register_hook(Log())
    runner.train()
    assert progress.peak_memory == 700


def test_a_resumed_run_counts_the_seconds_before_its_checkpoint(
    tmp_path, monkeypatch
):
    clock = itertools.count()
    monkeypatch.setattr(
        trial, 'time', SimpleNamespace(perf_counter=lambda: float(next(clock)))
    )
    runner, first = watched(tmp_path)
    runner.train()
    assert len(first.steps) == 4
    # begin of the run, then three looks at the clock in each of four steps
    saved = runner.message_hub.get_info(trial.SECONDS)
    assert saved == 12.0
    for _ in range(1000):  # the time that it lies dead
        next(clock)
    runner, second = watched(
        tmp_path,
        train_cfg=dict(type='mmauxq.EpochLoop', max_epochs=2),
        resume=True,
        load_from=str(tmp_path / 'epoch_1.pth'),
    )
    runner.train()
    assert len(second.steps) == 4
    assert runner.message_hub.get_info(trial.SECONDS) == 24.0
    assert second.seconds == 25.0
