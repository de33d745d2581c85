import json

from mmauxq.evaluation import sweep
from mmauxq.evaluation.mmpretrain_configs import classifier_configs


def broken(config):
    if config == 'raises':
        raise RuntimeError('no')
    if config.startswith('hangs'):
        import time

        time.sleep(600)
    return sweep.Row(config, verdict='pass')


def test_one_that_fails_does_not_stop_the_others():
    seen = []
    rows = sweep.sweep(
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
    rows = sweep.sweep(['hangs', 'hangs too'], broken, jobs=1, timeout=1)
    assert [row.reason for row in rows] == ['given up after 1 s'] * 2


def test_the_smallest_of_a_type():
    configs = classifier_configs(
        ['shufflenet_v*/*', 'regnet/*-[48]00*', 'mobileone/**/*-s0_*']
    )
    assert sweep.smallest_of_each_type(configs) == [
        'mobileone/mobileone-s0_8xb32_in1k.py',
        'regnet/regnetx-400mf_8xb128_in1k.py',
        'shufflenet_v1/shufflenet-v1-1x_16xb64_in1k.py',
        'shufflenet_v2/shufflenet-v2-1x_16xb64_in1k.py',
    ]


def test_the_table_tells_all():
    rows = [
        sweep.Row('a.py', 'A', 'pass', taps=2, layouts=['map']),
        sweep.Row('b.py', 'B', 'fail', 'why', kept={'x.fc': 'read elsewhere'}),
    ]
    text = sweep.as_markdown(rows)
    assert '| A | a.py |' in text and '2 (map)' in text
    assert '1 of 2 pass.' in text
    assert '* b.py: fail, why' in text
    assert '* b.py: float are x.fc: read elsewhere' in text
    lines = sweep.as_json_lines(rows).splitlines()
    assert [json.loads(line)['verdict'] for line in lines] == ['pass', 'fail']
    again = sweep.from_json_lines(sweep.as_json_lines(rows))
    assert sweep.as_markdown(again) == text
