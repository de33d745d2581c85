from mmauxq.evaluation import config_check
from mmauxq.evaluation.config_check import try_config

LENET = 'lenet/lenet5_mnist.py'


def test_all_checks_of_a_small_network():
    row = try_config(LENET)
    assert (row.verdict, row.reason) == ('pass', '')
    assert row.backbone == 'LeNet5'
    assert row.quantized == 3 and set(row.kept.values()) == {
        'first layer',
        'classifier',
    }
    assert row.moved == (6, 6)


def test_the_network_of_mmpretrain_may_be_at_fault(monkeypatch):
    def build(cfg):
        raise config_check.NetworkError('no such checkpoint')

    monkeypatch.setattr(config_check, 'float_network', build)
    row = try_config(LENET)
    assert (row.verdict, row.reason) == ('mmpretrain', 'no such checkpoint')
