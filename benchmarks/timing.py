"""Time and memory of a function's calls, on a GPU or on the CPU."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from mmauxq.accelerate.kernels.dispatch import keep_alive

GIB = 2**30


@dataclass
class Timing:
    """Milliseconds of one call: median and spread of several measurements.

    Args:
        ms: Median.
        low: 10th percentile.
        high: 90th percentile.
        repeats: Number of measurements.
    """

    ms: float
    low: float
    high: float
    repeats: int

    def record(self, prefix: str = '') -> dict[str, float]:
        """The values by their names, rounded, for a line of JSON.

        Args:
            prefix: Before each name.
        """
        return {
            f'{prefix}{name}': round(value, 5)
            for name, value in asdict(self).items()
        }


def timed(
    run: Callable[[], object], repeats: int, warmup: int = 3, inner: int = 1
) -> Timing:
    """Time ``run``; on a GPU by events on its own clock.

    Args:
        run: Called ``warmup + repeats * inner`` times.
        repeats: Number of measurements.
        warmup: Calls before the first measurement.
        inner: Calls in each measurement; several if a call is short.
    """
    for _ in range(warmup):
        run()
    on_gpu = torch.cuda.is_available()
    times = sorted((_on_gpu if on_gpu else _on_cpu)(run, repeats, inner))
    low, high = (times[round(part * (repeats - 1))] for part in (0.1, 0.9))
    return Timing(statistics.median(times), low, high, repeats)


def _on_cpu(
    run: Callable[[], object], repeats: int, inner: int
) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            run()
        times.append((time.perf_counter() - start) * 1e3 / inner)
    return times


def _on_gpu(
    run: Callable[[], object], repeats: int, inner: int
) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    torch.cuda.synchronize()
    marks[0].record()
    for mark in marks[1:]:
        for _ in range(inner):
            run()
        mark.record()
    torch.cuda.synchronize()
    return [
        before.elapsed_time(after) / inner
        for before, after in zip(marks, marks[1:], strict=False)
    ]


def graphed(
    run: Callable[[], object], warmup: int = 3
) -> Callable[[], object]:
    """Record ``run`` as a CUDA graph; returns what replays it.

    Args:
        run: Works on the same memory each time.
        warmup: Calls before the recording, on a side stream.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with keep_alive() as kept, torch.cuda.graph(graph):
        run()

    def replay(kept: list = kept) -> None:  # holds what the graph reads
        graph.replay()

    return replay


def kernel_ms(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds in kernels of one call, without the time between them.

    Measured by PyTorch's profiler, on a GPU only.

    Args:
        run: Called ``repeats + 1`` times.
        repeats: Calls over which the mean is taken.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    microseconds = sum(
        event.self_device_time_total for event in profiled.key_averages()
    )
    return microseconds / 1e3 / repeats


def peak_gib(run: Callable[[], object]) -> float | None:
    """Peak memory of tensors while ``run`` runs, in GiB; None on the CPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB
