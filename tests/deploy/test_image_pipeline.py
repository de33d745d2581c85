import json

import pytest
from mmengine.config import Config

from mmauxq.deploy.image_pipeline import image_pipeline

READ, PACK = dict(type='LoadImageFromFile'), dict(type='PackInputs')


def pipeline_of(*steps, **settings):
    dataset = dict(type='ImageNet', pipeline=[READ, *steps, PACK])
    return image_pipeline(Config(dict(val_dataloader=dict(dataset=dataset))))


def test_all_arguments_are_spelled_out(root):
    cfg = Config.fromfile(root / 'configs/qat_r18_w4a4.py')
    steps = image_pipeline(cfg)
    assert steps[0] == dict(
        type='ResizeEdge', scale=256, edge='short', backend='cv2',
        interpolation='bilinear',
    )  # fmt: skip
    assert steps[1]['type'] == 'CenterCrop' and steps[1]['crop_size'] == 224
    assert json.loads(json.dumps(steps)) == steps


def test_what_the_config_says_counts():
    step = dict(
        type='mmpretrain.ResizeEdge', scale=236, edge='short',
        backend='pillow', interpolation='bicubic',
    )  # fmt: skip
    assert pipeline_of(step) == [{**step, 'type': 'ResizeEdge'}]
    (resize,) = pipeline_of(dict(type='Resize', scale=(224, 192)))
    assert tuple(resize['scale']) == (224, 192)
    assert resize['interpolation'] == 'bilinear'


def test_the_data_set_inside_of_a_wrapper():
    inner = dict(type='ImageNet', pipeline=[READ, PACK])
    outer = dict(type='RepeatDataset', times=2, dataset=inner)
    cfg = Config(dict(val_dataloader=dict(dataset=outer)))
    assert image_pipeline(cfg) == []


@pytest.mark.parametrize(
    'step', [dict(type='Mine'), dict(type='mine.CenterCrop'), 'not a dict']
)
def test_other_transforms_are_unknown(step):
    assert pipeline_of(step) is None


@pytest.mark.parametrize(
    'cfg',
    [
        {},
        dict(val_dataloader=None),
        dict(val_dataloader=dict(dataset=dict(type='mmauxq.InMemoryImages'))),
    ],
)
def test_no_pipeline_is_unknown(cfg):
    assert image_pipeline(Config(cfg)) is None
