import json

import pytest

from mmauxq.errors import UsageError
from mmauxq.evaluation import sweep

LENET = 'lenet/lenet5_mnist.py'


def broken(config):
    if config == 'raises':
        raise RuntimeError('no')
    if config == 'hangs':
        import time

        time.sleep(60)
    return sweep.Row(config, verdict='pass')


def test_one_that_fails_does_not_stop_the_others():
    seen = []
    rows = sweep.sweep(
        ['good', 'raises', 'hangs', 'fine'],
        broken,
        jobs=2,
        timeout=3,
        on_row=lambda row: seen.append(row.config),
    )
    assert [row.config for row in rows] == ['good', 'raises', 'hangs', 'fine']
    assert [row.verdict for row in rows] == ['pass', 'fail', 'fail', 'pass']
    assert 'ended with' in rows[1].reason
    assert rows[2].reason == 'given up after 3 s'
    assert sorted(seen) == sorted(row.config for row in rows)


def test_all_checks_of_a_small_network():
    row = sweep.try_config(LENET)
    assert (row.verdict, row.reason) == ('pass', '')
    assert row.backbone == 'LeNet5'
    assert row.quantized == 3 and set(row.kept.values()) == {
        'first layer',
        'classifier',
    }
    assert row.moved == (6, 6)


def test_the_network_of_mmpretrain_may_be_at_fault(monkeypatch):
    def build(cfg):
        raise sweep.NetworkError('no such checkpoint')

    monkeypatch.setattr(sweep, '_network', build)
    row = sweep.try_config(LENET)
    assert (row.verdict, row.reason) == ('mmpretrain', 'no such checkpoint')


def test_configs_are_found_by_pattern():
    found = sweep.classifier_configs(['lenet/*', 'mobilenet_v2/*'])
    assert found[LENET] == 'LeNet5'
    assert set(found.values()) == {'LeNet5', 'MobileNetV2'}
    with pytest.raises(UsageError, match='no config of an image classifier'):
        sweep.classifier_configs(['no/such*'])


def test_the_smallest_of_a_type():
    configs = sweep.classifier_configs(['shufflenet_v*/*', 'regnet/*-[48]00*'])
    assert sweep.smallest_of_each_type(configs) == [
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


def test_checkpoints_are_not_downloaded():
    cfg = dict(
        backbone=dict(
            init_cfg=dict(type='Pretrained', checkpoint='https://x'),
            pretrained='https://y',
        ),
        init_cfg=[dict(type='TruncNormal')],
    )
    found = sweep._without_checkpoints(cfg)
    assert found['backbone'] == dict(init_cfg=None, pretrained=None)
    assert found['init_cfg'] == [dict(type='TruncNormal')]
