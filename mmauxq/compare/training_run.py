"""One training run of a comparison, and what is measured of it.

Started as ``python -m mmauxq.compare.training_run FOLDER SEED METRIC
[CHECKPOINT]``.
"""

import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmauxq import compat
from mmauxq.algorithms import JointQAT
from mmauxq.analysis import block_gradient_norms
from mmauxq.config_types import JOINT, type_name
from mmauxq.engine.build_runner import RememberedText
from mmauxq.engine.defaults import apply_defaults
from mmauxq.engine.hooks import EpochLengthHook, TeacherCheckHook
from mmauxq.engine.image_shape import set_image_shape
from mmauxq.engine.resume import named_checkpoint, set_start
from mmauxq.engine.running import end_loaders
from mmauxq.errors import TrainingError
from mmauxq.files import link_atomically, write_atomically
from mmauxq.stopping import end_with

from .records import TOP1, check_metric, check_record, commit, read_result

SECONDS = 'mmauxq/seconds'


@dataclass(frozen=True)
class Trial:
    """The results of one run.

    Args:
        accuracy: The metric of F on the validation set after each epoch,
            percent.
        seconds: Wall time of training and validation, with the time that a
            resumed run took before its checkpoint.
        step_seconds: Median wall time of a training step in the process that
            trained last; 0 if it is not known.
        peak_memory: Most bytes allocated on the GPU in a training step of
            that process; 0 without a GPU.
        cost: Fields of a :class:`mmauxq.algorithms.build.Cost`; empty for
            a float network.
        gradients: Result of :func:`block_gradient_norms` on the first
            training batch after the last step; empty for a float network.
        config: The config that ran; checkpoints are in its ``work_dir``.
    """

    accuracy: list[float]
    seconds: float
    step_seconds: float
    peak_memory: int
    cost: dict
    gradients: dict[str, dict[str, float]]
    config: Config

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of the last epoch."""
        work_dir = Path(self.config.work_dir)
        last = named_checkpoint(work_dir)
        if last is None:
            raise TrainingError(f'{work_dir} names no last checkpoint')
        return last


class _Progress(Hook):
    """Reports the progress of a run, and measures it."""

    # before MMEngine's log sets back the count of memory
    priority = 'NORMAL'

    def __init__(
        self, report: Callable[[int, int], None], metric: str
    ) -> None:
        self.report, self.metric = report, metric
        self.steps: list[float] = []
        self.peak_memory = 0
        self.begin = self.start = 0.0

    def before_train(self, runner) -> None:
        # checkpoints keep the entries of the message hub
        before = runner.message_hub.runtime_info.get(SECONDS, 0.0)
        self.start = time.perf_counter() - before

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.begin = time.perf_counter()

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        self.steps.append(time.perf_counter() - self.begin)
        memory = torch.cuda.max_memory_allocated()
        self.peak_memory = max(self.peak_memory, memory)
        runner.message_hub.update_info(SECONDS, self.seconds)
        self.report(runner.iter + 1, runner.max_iters)

    def after_val_epoch(self, runner, metrics=None) -> None:
        check_metric(self.metric, metrics or {})

    @property
    def seconds(self) -> float:
        """Wall time of training, without that between a stop and a resume."""
        return time.perf_counter() - self.start


def run_trial(
    config: Config,
    work_dir: Path,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
    resume: bool = False,
    metric: str = TOP1,
) -> Trial:
    """Train a complete recipe in this process.

    Args:
        config: Not changed.
        work_dir: For checkpoints and logs.
        seed: Of everything random.
        report: Called after each step with the steps done and their number.
        resume: Go on from the last checkpoint in ``work_dir``, if there is
            one.
        metric: What the validation gives in percent, the more the better.

    Raises:
        UsageError: At the first validation without that metric.
    """
    config = copy.deepcopy(config)
    config.work_dir = str(work_dir)
    config.randomness = dict(seed=seed)
    config.experiment_name = f'{work_dir.name}_{time.time_ns()}'
    set_image_shape(config)
    apply_defaults(config)
    if resume and any(work_dir.glob('*_*.pth')):
        set_start(config, 'auto')
    progress = _Progress(report, metric)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    runner = Runner.from_cfg(RememberedText.of(config))
    for hook in (progress, TeacherCheckHook(), EpochLengthHook()):
        runner.register_hook(hook)
    runner.train()
    seconds = progress.seconds
    accuracy, _ = runner.message_hub.get_scalar(f'val/{metric}').data
    cost, gradients = {}, {}
    if isinstance(runner.model, JointQAT):
        model = runner.model.train()
        cost = asdict(model.cost)
        batch = next(iter(runner.train_dataloader))
        inputs = model.data_preprocessor(batch, True)
        gradients = block_gradient_norms(model, **inputs)
    end_loaders(runner)
    return Trial(
        accuracy=[float(value) for value in accuracy],
        seconds=seconds,
        step_seconds=statistics.median(progress.steps or [0.0]),
        peak_memory=progress.peak_memory,
        cost=cost,
        gradients=gradients,
        config=config,
    )


def run_one(
    folder: Path, seed: int, metric: str = TOP1, start: str | None = None
) -> None:
    """Train one run in this process and write its ``result.json``."""
    compat.enable()
    config = Config.fromfile(folder / 'recipe.py')
    if start is not None and type_name(config.model.type) == JOINT:
        config.model.float_checkpoint = start
    on_gpu = torch.cuda.is_available()

    def report(done: int, total: int) -> None:
        if done % 10 == 0 or done == total:
            with suppress(OSError):  # nothing is lost without them
                (folder / 'progress').write_text(f'{done} {total}')
                if on_gpu:
                    free, _ = torch.cuda.mem_get_info()
                    held = torch.cuda.memory_reserved()
                    (folder / 'memory').write_text(f'{free} {held}')

    trial = run_trial(config, folder, seed, report, True, metric)
    record = dict(arm=folder.parent.name, seed=seed, commit=commit())
    record['metric'] = metric
    record |= dict(start=start, float_final=_final_of(start, metric))
    record |= dict(final=trial.accuracy[-1])
    record |= dict(best=max(trial.accuracy), **vars(trial))
    record['gpu'] = torch.cuda.get_device_name() if on_gpu else None
    record['shared'] = (folder / 'shared').exists()
    record['config'] = trial.config.pretty_text
    # a name that does not depend on the number of epochs
    link_atomically(folder / 'last.pth', trial.last_checkpoint.name)
    content = json.dumps(record)
    check_record(json.loads(content), 'the result')
    write_atomically(folder / 'result.json', content.encode())


def _final_of(checkpoint: str | None, metric: str) -> float | None:
    """The final metric of the run of a comparison that left a checkpoint;
    None for one from elsewhere."""
    if checkpoint is None:
        return None
    result = Path(checkpoint).with_name('result.json')
    if not result.is_file():
        return None
    record = read_result(result)
    return record['final'] if record.get('metric') == metric else None


def main(words: list[str]) -> None:
    """Train the run FOLDER SEED METRIC [CHECKPOINT]; it ends together with the
    comparison that began it, as the next one would train it beside it."""
    end_with(os.getppid())
    folder, seed, metric, *start = words
    run_one(Path(folder), int(seed), metric, *start)


if __name__ == '__main__':
    main(sys.argv[1:])
