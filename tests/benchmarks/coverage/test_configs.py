import pytest
from mmengine.config import Config

from benchmarks.coverage.configs import (
    classifier_configs,
    limit_size,
    linear_head,
    recipe,
    without_downloads,
)
from mmauxq.errors import UsageError


def test_configs_are_found_by_pattern():
    configs = classifier_configs(['lenet/*', 'mobilenet_v2/*'])
    assert configs['lenet/lenet5_mnist.py'] == 'LeNet5'
    assert set(configs.values()) == {'LeNet5', 'MobileNetV2'}
    with pytest.raises(UsageError, match=r'expected a config of .*no/such\*'):
        classifier_configs(['no/such*'])


def test_the_recipe_has_the_size_of_its_images():
    """It trains on other images than it is tested on."""
    cfg = recipe('efficientnet_v2/efficientnetv2-b0_8xb32_in1k.py')
    assert cfg.model.type == 'mmauxq.JointQAT'
    assert cfg.model.input_shape == (3, 192, 192)


def test_a_backbone_without_a_head_gets_one():
    config = 'eva02/eva02-tiny-p14_headless.py'
    head = linear_head(config)
    assert head['neck'] is None  # it averages its tokens
    assert (head['head']['in_channels'], head['head']['num_classes']) == (
        192,
        1000,
    )
    cfg = recipe(config, head)
    assert cfg.model.architecture.head == head['head']
    assert linear_head('lenet/lenet5_mnist.py') == {}
    with pytest.raises(UsageError, match='a backbone but no head'):
        recipe(config)


@pytest.mark.parametrize('size, tried', [(1024, 224), (384, 384)])
def test_very_large_images_are_not_tried(size, tried):
    backbone = dict(img_size=size)
    assert limit_size(backbone) == (size if size != tried else None)
    assert backbone == dict(img_size=tried)
    assert limit_size(backbone) is None


def test_nothing_is_downloaded():
    cfg = dict(
        backbone=dict(
            init_cfg=dict(type='Pretrained', checkpoint='https://x'),
            pretrained='https://y',
        ),
        init_cfg=[dict(type='TruncNormal')],
        data=[dict(type='MNIST'), dict(type='ImageNet')],
    )
    assert without_downloads(cfg) is cfg
    assert cfg['backbone'] == dict(init_cfg=None, pretrained=None)
    assert cfg['init_cfg'] == [dict(type='TruncNormal')]
    assert cfg['data'] == [
        dict(type='MNIST', download=False),
        dict(type='ImageNet'),
    ]


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / 'own.py'
    file.write_text("_base_ = 'mmpretrain::lenet/lenet5_mnist.py'\n")
    assert classifier_configs([str(file)]) == {str(file): 'LeNet5'}
    network = recipe(str(file)).model.architecture
    assert network == Config.fromfile(file).model
