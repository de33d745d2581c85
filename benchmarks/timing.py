"""Time and memory of a piece of work, on a GPU or on the CPU."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

GIB = 2**30


@dataclass
class Timing:
    """Milliseconds of one call: the median of all repeats, and their spread.

    Args:
        ms: Median.
        low: 10th percentile.
        high: 90th percentile.
        repeats: How many were measured.
    """

    ms: float
    low: float
    high: float
    repeats: int

    def record(self, prefix: str = '') -> dict[str, float]:
        """For a line of JSON."""
        return {
            f'{prefix}{name}': round(value, 5)
            for name, value in asdict(self).items()
        }


def timed(
    run: Callable[[], object], repeats: int, warmup: int = 3, inner: int = 1
) -> Timing:
    """Time ``run``; on a GPU by events on its own clock.

    Args:
        run: Is called ``warmup + repeats * inner`` times.
        repeats: Number of measurements.
        warmup: Calls before the first.
        inner: Calls in each measurement, for short ones.
    """
    for _ in range(warmup):
        run()
    if torch.cuda.is_available():
        times = _on_gpu(run, repeats, inner)
    else:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(inner):
                run()
            times.append((time.perf_counter() - start) * 1e3 / inner)
    ordered = sorted(times)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered),
        ordered[round(0.1 * last)],
        ordered[round(0.9 * last)],
        repeats,
    )


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
    """``run`` captured in a CUDA graph; what it launches, without the host.

    Args:
        run: Always works on the same memory; warmed up on a side stream.
        warmup: Calls before the capture.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def kernel_ms(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds that the kernels of one call take, without what lies
    between them; by PyTorch's profiler, GPU only.

    Args:
        run: Is called ``repeats + 1`` times.
        repeats: Over how many calls the mean is taken.
    """
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    microseconds = sum(
        event.self_device_time_total for event in found.key_averages()
    )
    return microseconds / 1e3 / repeats


def peak_gib(run: Callable[[], object]) -> float | None:
    """Most memory that tensors take while ``run`` runs, in GiB; GPU only."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / GIB
