from benchmarks import timing


def test_the_median_and_its_spread(monkeypatch):
    """Of eleven measurements of two calls, which take 0 to 10 seconds."""
    monkeypatch.setattr(timing.torch.cuda, 'is_available', lambda: False)
    seconds = [3, 1, 4, 0, 5, 9, 2, 6, 10, 8, 7]
    clock = iter([t for k in seconds for t in (100, 100 + k)])
    monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(clock))
    calls = []
    found = timing.timed(lambda: calls.append(1), 11, warmup=3, inner=2)
    assert len(calls) == 3 + 11 * 2
    assert found == timing.Timing(2500.0, 500.0, 4500.0, 11)
    assert found.record('a_') == dict(
        a_ms=2500.0, a_low=500.0, a_high=4500.0, a_repeats=11
    )
