"""One training run of a comparison, and what it leaves behind."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

METRIC = 'val/accuracy/top1'


@dataclass(frozen=True)
class Trial:
    """What one run gave.

    Args:
        accuracy: Top-1 of F on the validation set after each epoch, percent.
        seconds: Wall time of training and validation, of this process: a
            resumed run does not count what came before.
        step_seconds: Median wall time of a training step.
        peak_memory: Most bytes allocated on the GPU, 0 without one.
        work_dir: Where checkpoints and logs are.
        config: As it was run.
    """

    accuracy: list[float]
    seconds: float
    step_seconds: float
    peak_memory: int
    work_dir: Path
    config: Config

    @property
    def best(self) -> float:
        """The best accuracy of all epochs."""
        return max(self.accuracy)

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of the last epoch."""
        return Path((self.work_dir / 'last_checkpoint').read_text().strip())


class _Progress(Hook):
    """Tells somebody how far a run is, and times its steps."""

    priority = 'LOWEST'

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report
        self.steps: list[float] = []
        self.begin = 0.0

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        self.begin = time.perf_counter()

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        self.steps.append(time.perf_counter() - self.begin)
        self.report(runner.iter + 1, runner.max_iters)


def run_trial(
    config: Config,
    work_dir: Path,
    seed: int,
    report: Callable[[int, int], None] = lambda done, of: None,
    resume: bool = False,
) -> Trial:
    """Train ``config`` in this process.

    Args:
        config: A complete recipe; not changed.
        work_dir: For checkpoints and logs.
        seed: Of everything random.
        report: Called after each step with the steps done and their number.
        resume: Go on from the last checkpoint in ``work_dir``, if there is
            one.
    """
    config = copy.deepcopy(config)
    config.work_dir = str(work_dir)
    config.randomness = dict(seed=seed)
    config.experiment_name = f'{Path(work_dir).name}_{time.time_ns()}'
    last = Path(work_dir) / 'last_checkpoint'
    if resume and last.is_file():
        config.resume, config.load_from = True, last.read_text().strip()
    progress = _Progress(report)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    runner = Runner.from_cfg(config)
    runner.register_hook(progress)
    begin = time.perf_counter()
    runner.train()
    seconds = time.perf_counter() - begin
    history, _ = runner.message_hub.get_scalar(METRIC).data
    return Trial(
        accuracy=[float(value) for value in history],
        seconds=seconds,
        step_seconds=statistics.median(progress.steps or [0.0]),
        peak_memory=(
            torch.cuda.max_memory_allocated()
            if torch.cuda.is_available()
            else 0
        ),
        work_dir=Path(work_dir),
        config=config,
    )
