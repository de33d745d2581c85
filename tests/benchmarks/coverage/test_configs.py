import pytest

from mmauxq.errors import UsageError
from mmauxq.evaluation import mmpretrain_configs


def test_configs_are_found_by_pattern():
    found = mmpretrain_configs.classifier_configs(
        ['lenet/*', 'mobilenet_v2/*']
    )
    assert found['lenet/lenet5_mnist.py'] == 'LeNet5'
    assert set(found.values()) == {'LeNet5', 'MobileNetV2'}
    with pytest.raises(UsageError, match='no config of an image classifier'):
        mmpretrain_configs.classifier_configs(['no/such*'])


def test_checkpoints_are_not_downloaded():
    cfg = dict(
        backbone=dict(
            init_cfg=dict(type='Pretrained', checkpoint='https://x'),
            pretrained='https://y',
        ),
        init_cfg=[dict(type='TruncNormal')],
    )
    found = mmpretrain_configs.without_checkpoints(cfg)
    assert found['backbone'] == dict(init_cfg=None, pretrained=None)
    assert found['init_cfg'] == [dict(type='TruncNormal')]
