"""One training run of a comparison, and what is measured of it."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn

from mmauxq.algorithms import JointQAT
from mmauxq.analysis import block_gradient_norms
from mmauxq.engine.defaults import add_watch_hooks, use_resumable_loop
from mmauxq.engine.hooks import EpochLengthHook, TeacherCheckHook
from mmauxq.engine.image_shape import set_image_shape
from mmauxq.engine.resume import set_start
from mmauxq.errors import UsageError, one_line
from mmauxq.registry import MODELS

METRIC = 'val/accuracy/top1'
SECONDS = 'mmauxq/seconds'


@dataclass(frozen=True)
class Trial:
    """The results of one run.

    Args:
        accuracy: Top-1 of F on the validation set after each epoch, percent.
        seconds: Wall time of training and validation. A resumed run counts
            the time before its checkpoint, too.
        step_seconds: Median wall time of a training step, of this process.
        peak_memory: Most bytes allocated on the GPU in a training step, of
            this process; 0 without a GPU.
        cost: Fields of a :class:`mmauxq.algorithms.build.Cost`; empty for
            a float network.
        gradients: Result of :func:`block_gradient_norms` on the first
            training batch after the last step; empty for a float network.
        work_dir: Where checkpoints and logs are.
        config: The config that ran.
    """

    accuracy: list[float]
    seconds: float
    step_seconds: float
    peak_memory: int
    cost: dict
    gradients: dict[str, dict[str, float]]
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
    """Reports the progress of a run, and measures it."""

    # before MMEngine's log sets back the count of memory
    priority = 'NORMAL'

    def __init__(self, report: Callable[[int, int], None]) -> None:
        self.report = report
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
        if torch.cuda.is_available():
            self.peak_memory = max(
                self.peak_memory, torch.cuda.max_memory_allocated()
            )
        runner.message_hub.update_info(SECONDS, self.seconds)
        self.report(runner.iter + 1, runner.max_iters)

    @property
    def seconds(self) -> float:
        """Wall time of training, without the time between two sessions."""
        return time.perf_counter() - self.start


def run_trial(
    config: Config,
    work_dir: Path,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
    resume: bool = False,
) -> Trial:
    """Train ``config`` in this process.

    Args:
        config: A complete recipe; not changed.
        work_dir: For checkpoints and logs.
        seed: Seed of everything random.
        report: Called after each step with the steps done and their number.
        resume: Go on from the last checkpoint in ``work_dir``, if there is
            one.
    """
    config = copy.deepcopy(config)
    config.work_dir = str(work_dir)
    config.randomness = dict(seed=seed)
    config.experiment_name = f'{Path(work_dir).name}_{time.time_ns()}'
    set_image_shape(config)
    use_resumable_loop(config)
    add_watch_hooks(config)
    if resume and (Path(work_dir) / 'last_checkpoint').is_file():
        set_start(config, 'auto')
    progress = _Progress(report)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    runner = Runner.from_cfg(config)
    runner.register_hook(progress)
    runner.register_hook(TeacherCheckHook())
    runner.register_hook(EpochLengthHook())
    runner.train()
    seconds = progress.seconds
    quantized = isinstance(runner.model, JointQAT)
    history, _ = runner.message_hub.get_scalar(METRIC).data
    return Trial(
        accuracy=[float(value) for value in history],
        seconds=seconds,
        step_seconds=statistics.median(progress.steps or [0.0]),
        peak_memory=progress.peak_memory,
        cost=asdict(runner.model.cost) if quantized else {},
        gradients=_gradients(runner) if quantized else {},
        work_dir=Path(work_dir),
        config=config,
    )


def _gradients(runner: Runner) -> dict[str, dict[str, float]]:
    model = runner.model.train()
    batch = next(iter(runner.train_dataloader))
    return block_gradient_norms(model, **model.data_preprocessor(batch, True))


def build_model(config: Config) -> nn.Module:
    """The model of a recipe, as the runner builds it.

    Args:
        config: A complete recipe; not changed.

    Raises:
        UsageError: If it cannot be built.
    """
    init_default_scope(config.get('default_scope', 'mmpretrain'))
    config = copy.deepcopy(config)
    set_image_shape(config)
    model = config.model
    if config.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', config.data_preprocessor)
    try:
        return MODELS.build(model)
    except UsageError:
        raise
    except (KeyError, TypeError, ValueError, AssertionError) as error:
        raise UsageError(one_line(error, 300)) from error
