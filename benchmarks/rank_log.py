"""What every rank of a run measures of itself."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook

from mmauxq.registry import HOOKS


@HOOKS.register_module()
class RankLog(Hook):
    """Times a run's steps and writes ``FOLDER/rankN.json`` for each rank.

    Nothing waits for the GPU but the two ends of what is timed. Rank 0 writes
    a trace of the steps after that, ``FOLDER/trace.json``.

    Args:
        folder: There already.
        begin: Steps before the first that counts.
        steps: That count.
        profile: In the trace, after them and one more; 0 for none.
    """

    priority = 'LOWEST'

    def __init__(
        self, folder: str, begin: int, steps: int, profile: int = 0
    ) -> None:
        self.folder, self.profile = Path(folder), profile
        self.begin, self.end = begin, begin + steps
        self.found: dict[str, Any] = dict(steps=steps)
        self.profiler: torch.profiler.profile | None = None
        self.start, self.peak = 0.0, 0

    def before_train(self, runner: Any) -> None:
        """Note when the set-up was over."""
        self.found['began'] = time.time()

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Begin, end, or go on."""
        step = runner.iter + 1
        if torch.cuda.is_available():  # the log sets it back
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        if self.profiler is not None:
            self.profiler.step()
        if step == self.begin:
            self._wait()
            self.start = time.perf_counter()
        elif step == self.end:
            self._wait()
            self.found['seconds'] = time.perf_counter() - self.start
            for name in ('time', 'data_time'):
                values = runner.message_hub.get_scalar(f'train/{name}').data[0]
                self.found[name] = [
                    round(float(v), 6) for v in values[self.begin :]
                ]
            if self.profile and get_rank() == 0:
                self._start_profiler()

    def after_train(self, runner: Any) -> None:
        """Write what was found."""
        if self.profiler is not None:
            self.profiler.stop()
        if torch.cuda.is_available():
            self.found['peak_bytes'] = self.peak
            self.found['reserved_bytes'] = torch.cuda.max_memory_reserved()
        path = self.folder / f'rank{get_rank()}.json'
        path.write_text(json.dumps(self.found))

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _start_profiler(self) -> None:
        from torch import profiler

        activities = [profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(profiler.ProfilerActivity.CUDA)
        trace = str(self.folder / 'trace.json')
        self.profiler = profiler.profile(
            activities=activities,
            schedule=profiler.schedule(
                wait=0, warmup=1, active=self.profile, repeat=1
            ),
            on_trace_ready=lambda found: found.export_chrome_trace(trace),
        )
        self.profiler.start()
