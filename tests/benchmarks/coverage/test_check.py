import pytest
from mmengine.config import Config

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


@pytest.mark.parametrize('size, tried', [(1024, 224), (384, 384)])
def test_very_large_images_are_not_tried(size, tried):
    cfg = Config(
        dict(model=dict(architecture=dict(backbone=dict(img_size=size))))
    )
    row = config_check.Row('x.py')
    for _ in range(2):
        config_check._limit_size(cfg, row)
    assert cfg.model.architecture.backbone.img_size == tried
    note = 'tried at 224 pixels instead of 1024'
    assert row.reason == (note if size == 1024 else '')


def test_builds_with_small_images():
    row = try_config('resnet/resnet18_8xb32_in1k.py', build_only=True)
    assert (row.verdict, row.reason) == ('pass', '')
    assert (row.quantized, row.taps) == (19, 9)
    assert row.moved == (0, 0)
