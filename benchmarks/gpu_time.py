"""How a GPU spends its time, from a trace of PyTorch's profiler."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

Spans = list[tuple[float, float]]
ON_GPU = ('kernel', 'gpu_memcpy', 'gpu_memset')


def split(events: Sequence[dict]) -> dict[str, float] | None:
    """Milliseconds of a step, by what the GPU does.

    Args:
        events: ``traceEvents`` of a trace with whole steps.

    Returns:
        ``computing``, ``all_reduce``, ``sync_bn`` and ``idle`` add up to the
        step: of a collective, they have the time in which nothing is
        computed. ``all_reduce_total`` and ``sync_bn_total`` have all of its
        time, also that in which it waits for other ranks. None if no kernel
        ran.
    """
    work: Spans = []
    collectives: dict[str, Spans] = dict(all_reduce=[], sync_bn=[])
    launches = _launches(events)
    norms = _batch_norms(events)
    steps = 0
    for event in events:
        kind = event.get('cat')
        name = event.get('name', '')
        if kind == 'user_annotation' and name.startswith('ProfilerStep'):
            steps += 1
        if kind not in ON_GPU:
            continue
        span = (event['ts'], event['ts'] + event['dur'])
        if 'nccl' not in name.lower():
            work.append(span)
            continue
        thread, time = launches.get(
            event.get('args', {}).get('correlation'), (None, 0)
        )
        inside = any(a <= time <= b for a, b in norms.get(thread, ()))
        collectives['sync_bn' if inside else 'all_reduce'].append(span)
    everything = work + collectives['all_reduce'] + collectives['sync_bn']
    if not everything:
        return None
    steps = max(steps, 1)
    begin = min(a for a, _ in everything)
    end = max(b for _, b in everything)
    with_norms = _length(work + collectives['sync_bn'])
    computing, busy = _length(work), _length(everything)
    microseconds = dict(
        computing=computing,
        sync_bn=with_norms - computing,
        all_reduce=busy - with_norms,
        idle=end - begin - busy,
        sync_bn_total=_length(collectives['sync_bn']),
        all_reduce_total=_length(collectives['all_reduce']),
    )
    return {k: round(v / 1e3 / steps, 3) for k, v in microseconds.items()}


def _launches(events: Iterable[dict]) -> dict:
    """Number of a launch -> (thread, time) of the launch."""
    return {
        event['args']['correlation']: (
            (event.get('pid'), event.get('tid')),
            event['ts'],
        )
        for event in events
        if event.get('cat') in ('cuda_runtime', 'cuda_driver')
        and 'correlation' in event.get('args', {})
    }


def _batch_norms(events: Iterable[dict]) -> dict[tuple, Spans]:
    """Thread of the host -> when it was inside SyncBN."""
    spans = defaultdict(list)
    for event in events:
        if event.get('cat') == 'cpu_op' and 'SyncBatchNorm' in event['name']:
            span = (event['ts'], event['ts'] + event['dur'])
            spans[event.get('pid'), event.get('tid')].append(span)
    return spans


def _length(spans: Spans) -> float:
    """Length of the union of the spans."""
    total, reached = 0.0, float('-inf')
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
