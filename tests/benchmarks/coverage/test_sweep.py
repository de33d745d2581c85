from benchmarks.coverage.configs import classifier_configs
from benchmarks.coverage.row import Row
from benchmarks.coverage.sweep import smallest_of_each_type, sweep


def broken(config):
    if config == 'raises':
        raise RuntimeError('no')
    if config.startswith('hangs'):
        import time

        time.sleep(600)
    return Row(config, verdict='pass')


def test_one_that_fails_does_not_stop_the_others():
    seen = []
    rows = sweep(
        ['good', 'raises', 'fine'],
        broken,
        jobs=2,
        timeout=600,
        on_row=lambda row: seen.append(row.config),
    )
    assert [row.config for row in rows] == ['good', 'raises', 'fine']
    assert [row.verdict for row in rows] == ['pass', 'fail', 'pass']
    assert 'ended with' in rows[1].reason
    assert sorted(seen) == sorted(row.config for row in rows)


def test_one_that_hangs_does_not_stop_the_others():
    """The others hang, too: they need not be quick for that."""
    rows = sweep(['hangs', 'hangs too'], broken, jobs=1, timeout=1)
    assert [row.reason for row in rows] == ['given up after 1 s'] * 2


def test_the_smallest_of_a_type():
    configs = classifier_configs(
        ['shufflenet_v*/*', 'regnet/*-[48]00*', 'mobileone/**/*-s0_*']
    )
    assert smallest_of_each_type(configs) == [
        'mobileone/mobileone-s0_8xb32_in1k.py',
        'regnet/regnetx-400mf_8xb128_in1k.py',
        'shufflenet_v1/shufflenet-v1-1x_16xb64_in1k.py',
        'shufflenet_v2/shufflenet-v2-1x_16xb64_in1k.py',
    ]
