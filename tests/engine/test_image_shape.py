"""The size of the images is found without reading a large data set."""

import random

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS
from torch.utils.data import Dataset

import mmauxq  # noqa: F401
from mmauxq.engine.image_shape import image_shape, set_image_shape
from mmauxq.errors import UsageError

PACK = dict(type='PackInputs')
FILE = dict(type='LoadImageFromFile')


@DATASETS.register_module()
class _Held(BaseDataset):
    """Images of the given size; every draw of its constructor counts."""

    built: list = []

    def __init__(self, size=(6, 7, 3), fail=False, **kwargs):
        self.size, self.fail = size, fail
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self):
        if self.fail:
            raise OSError('no such folder')
        random.random(), np.random.rand(), torch.rand(1)
        image = np.zeros(self.size, np.uint8)
        return [dict(img=image, gt_label=0) for _ in range(4)]

    def __getitem__(self, index):
        _Held.built.append(len(self))
        return super().__getitem__(index)


@DATASETS.register_module()
class _Text(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return dict(inputs='words')


def recipe(train, val=None, **model):
    cfg = dict(
        model=dict(type='mmauxq.JointQAT', **model),
        train_dataloader=dict(dataset=train),
    )
    if val is not None:
        cfg['val_dataloader'] = dict(dataset=val)
    return Config(cfg)


def files(*pipeline):
    """A data set of files that are not there."""
    return dict(type='ImageNet', data_root='none', pipeline=list(pipeline))


def held(*pipeline, **settings):
    return dict(type='_Held', pipeline=list(pipeline), **settings)


@pytest.mark.parametrize(
    'dataset, shape',
    [
        (files(FILE, dict(type='RandomResizedCrop', scale=64), PACK),
         (3, 64, 64)),
        (files(FILE, dict(type='ResizeEdge', scale=40, edge='short'),
               dict(type='CenterCrop', crop_size=(32, 24)), PACK),
         (3, 24, 32)),
        (files(FILE, dict(type='Resize', scale=(30, 20)), PACK), (3, 20, 30)),
        (files(dict(FILE, color_type='grayscale'),
               dict(type='RandomResizedCrop', scale=16), PACK), (1, 16, 16)),
        # remote files are not asked for
        (files(dict(FILE, backend_args=dict(backend='petrel')),
               dict(type='CenterCrop', crop_size=16), PACK), (3, 16, 16)),
        (dict(type='RepeatDataset', times=2, dataset=files(
            FILE, dict(type='CenterCrop', crop_size=16), PACK)), (3, 16, 16)),
        (held(PACK), (3, 6, 7)),
        (held(dict(type='RandomCrop', crop_size=5, padding=1), PACK),
         (3, 5, 5)),
        (dict(type='mmauxq.Digits', pipeline=[PACK]), (1, 8, 8)),
        (dict(type='mmauxq.InMemoryImages', padding=1,
              dataset=dict(type='mmauxq.Digits')), (1, 8, 8)),
        (dict(type='mmauxq.GeneratedImages', shape=(2, 3, 4)), (2, 3, 4)),
    ],
)  # fmt: skip
def test_the_size_of_the_images(dataset, shape):
    cfg = recipe(dataset)
    before = cfg.to_dict()
    assert image_shape(cfg, 'train_dataloader') == shape
    assert cfg.to_dict() == before


def test_a_data_set_reads_one_image_and_moves_no_generator():
    generators = [
        lambda: random.getstate(),
        lambda: np.random.get_state()[1].tolist(),
        lambda: torch.get_rng_state().tolist(),
    ]
    before = [state() for state in generators]
    _Held.built.clear()
    cfg = recipe(held(dict(type='RandomCrop', crop_size=5), PACK))
    assert image_shape(cfg, 'train_dataloader') == (3, 5, 5)
    assert _Held.built == [1]
    assert [state() for state in generators] == before


@pytest.mark.parametrize(
    'dataset, error, message',
    [
        (held(PACK, fail=True), OSError, 'no such folder'),
        (dict(type='_Text'), UsageError, 'no `inputs` of shape'),
    ],
)
def test_what_data_do_not_tell(capsys, dataset, error, message):
    with pytest.raises(error, match=message):
        image_shape(recipe(dataset), 'train_dataloader')
    cfg = recipe(dataset)
    set_image_shape(cfg)
    messages = capsys.readouterr().out.splitlines()
    assert 'input_shape' not in cfg.model
    (line,) = messages
    assert line.startswith('warning: train_dataloader does not tell the size')
    assert message in line and 'model.input_shape sets another' in line


def test_files_of_several_sizes_do_not_build_the_data_set(capsys):
    cfg = recipe(files(FILE, PACK))
    set_image_shape(cfg)
    messages = capsys.readouterr().out.splitlines()
    assert 'images have sizes such as' in messages[0]
    assert '(3, 375, 500)' in messages[0] and '(3, 480, 333)' in messages[0]
    assert 'input_shape' not in cfg.model


def test_training_and_evaluation_look_at_their_own_data():
    cfg = recipe(held(PACK), held(PACK, size=(9, 9)))
    set_image_shape(cfg)
    assert cfg.model.input_shape == (3, 6, 7)
    cfg = recipe(held(PACK), held(PACK, size=(9, 9)))
    set_image_shape(cfg, 'val')
    assert cfg.model.input_shape == (1, 9, 9)
    cfg = recipe(held(PACK))
    set_image_shape(cfg, 'val')
    assert cfg.model.input_shape == (3, 6, 7)


@pytest.mark.parametrize('given', [(3, 8, 8), [3, 8, 8]])
def test_one_line_names_both_sizes(capsys, given):
    cfg = recipe(held(PACK), input_shape=given)
    set_image_shape(cfg)
    messages = capsys.readouterr().out.splitlines()
    assert messages == [
        'warning: model.input_shape: expected (3, 6, 7), the images of '
        'train_dataloader, got (3, 8, 8): multiply-adds are counted for the '
        'latter'
    ]
    assert tuple(cfg.model.input_shape) == (3, 8, 8)


def test_nothing_is_said_where_the_size_is_right(capsys):
    cfg = recipe(held(PACK), input_shape=(3, 6, 7))
    set_image_shape(cfg)
    messages = capsys.readouterr().out.splitlines()
    assert messages == []


def test_other_models_are_left_alone():
    cfg = Config(dict(model=dict(type='ImageClassifier')))
    set_image_shape(cfg)
    assert 'input_shape' not in cfg.model


@pytest.mark.parametrize(
    'base, shape',
    [
        ('mmauxq::_base_/../aux_r20_w2a2_digits.py', (1, 8, 8)),
        ('mmauxq::_base_/../aux_r18_w4a4.py', (3, 224, 224)),
        ('mmpretrain::efficientnet/efficientnet-b0_8xb32_in1k.py',
         (3, 224, 224)),
        ('mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py',
         (3, 224, 224)),
    ],
)  # fmt: skip
@pytest.mark.parametrize('split', ['train', 'val'])
def test_of_the_recipes(tmp_path, base, shape, split):
    (tmp_path / 'recipe.py').write_text(f'_base_ = {base!r}')
    cfg = Config.fromfile(tmp_path / 'recipe.py')
    assert image_shape(cfg, f'{split}_dataloader') == shape
