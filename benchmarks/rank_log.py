"""What each rank of a run measures of itself."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import profiler


@HOOKS.register_module()
class RankLog(Hook):
    """Times a run's steps and writes ``FOLDER/rankN.json`` for each rank.

    The host waits for the GPU only where the timed steps begin and end. Rank
    0 profiles the steps after them into ``FOLDER/trace.json``.

    Args:
        folder: Exists already.
        begin: Number of steps before the timed ones.
        steps: Number of timed steps.
        profile: Number of profiled steps; one step lies between. 0 for none.
    """

    priority = 'LOWEST'

    def __init__(
        self, folder: str, begin: int, steps: int, profile: int = 0
    ) -> None:
        self.folder, self.profile = Path(folder), profile
        self.begin, self.end = begin, begin + steps
        self.record: dict[str, Any] = dict(steps=steps)
        self.profiler: profiler.profile | None = None
        self.start, self.peak = 0.0, 0

    def before_train(self, runner: Any) -> None:
        """Note when the set-up was over."""
        self.record['began'] = time.time()
        self.record['wrapper'] = type(runner.model).__name__

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Start or stop the clock, and the profiler."""
        step = runner.iter + 1
        if torch.cuda.is_available():  # MMEngine's log sets it back
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        if self.profiler is not None:
            self.profiler.step()
        if step == self.begin:
            _wait()
            self.start = time.perf_counter()
        elif step == self.end:
            _wait()
            self.record['seconds'] = time.perf_counter() - self.start
            for name in ('time', 'data_time'):
                values = runner.message_hub.get_scalar(f'train/{name}').data[0]
                self.record[name] = [
                    round(float(v), 6) for v in values[self.begin :]
                ]
            if self.profile and get_rank() == 0:
                self._start_profiler()

    def after_train(self, runner: Any) -> None:
        """Write the record."""
        if self.profiler is not None:
            self.profiler.stop()
        if torch.cuda.is_available():
            self.record['peak_bytes'] = self.peak
            self.record['reserved_bytes'] = torch.cuda.max_memory_reserved()
        self.record['ended'] = time.time()
        path = self.folder / f'rank{get_rank()}.json'
        path.write_text(json.dumps(self.record))

    def _start_profiler(self) -> None:
        activities = [profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(profiler.ProfilerActivity.CUDA)
        trace = str(self.folder / 'trace.json')
        self.profiler = profiler.profile(
            activities=activities,
            schedule=profiler.schedule(
                wait=0, warmup=1, active=self.profile, repeat=1
            ),
            on_trace_ready=lambda done: done.export_chrome_trace(trace),
        )
        self.profiler.start()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
