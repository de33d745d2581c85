"""The small project of a user: images, and a config for each part."""

import json
from pathlib import Path

import cv2
import numpy as np

from ..configs import config_root
from .part import Part

ROOT = Path(__file__).resolve().parents[3]
TOOLS = config_root().parent / 'tools'
CLASSES = ('a', 'b', 'c')
FEWEST = 3
"""Images of the first class; each next class has one more."""

HEAD = """
_base_ = [
    'mmpretrain::_base_/default_runtime.py',
    {quantization!r},
]
"""
RESNET = """
architecture = dict(
    type='ImageClassifier',
    backbone=dict(type='mmauxq.CIFARResNet', depth=8, base_channels=4),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=3, in_channels=16,
        loss=dict(type='CrossEntropyLoss')))
"""
VIT = """
architecture = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer', img_size=8, patch_size=4,
        arch=dict(
            embed_dims=16, num_layers=2, num_heads=2,
            feedforward_channels=32)),
    head=dict(
        type='VisionTransformerClsHead', num_classes=3, in_channels=16))
"""
NOISE = """
train_data = dict(
    type='mmauxq.GeneratedImages', length=12, shape=(3, 8, 8), num_classes=3)
test_data = train_data
"""
IMAGES = """
train_data = dict(
    type='CustomDataset', data_root='../images',
    pipeline=[
        dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5),
        dict(type='PackInputs')])
test_data = dict(train_data, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='PackInputs')])
"""
LABELS = """
train_data = dict(
    type='MultiLabelDataset', data_root='../images', ann_file='labels.json',
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='PackInputs',
             meta_keys=('img_path', 'gt_label_difficult'))])
test_data = train_data
architecture['head'] = dict(
    type='MultiLabelLinearClsHead', num_classes=3, in_channels=16)
"""
RUN = """
data_preprocessor = dict(num_classes=3, mean=[127.5] * 3, std=[127.5] * 3)
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=train_data,
    sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(
    batch_size=4, num_workers=0, dataset=test_data,
    sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = val_dataloader
val_evaluator = dict(type={metric!r})
train_cfg = dict(by_epoch=True, max_epochs=2)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4))
"""
JOINT = """
test_evaluator = val_evaluator
model = dict(architecture=architecture, **_base_.quantization)
"""
FLOAT = """
_base_ = 'config.py'
model = dict(_delete_=True, **_base_.architecture)
"""


def config_text(part: Part) -> str:
    """The config of a part."""
    if part.text:
        return part.text
    base = ROOT / 'configs' / '_base_' / 'aux_w4a4.py'
    several = part.data == 'labels'
    return ''.join(
        (
            HEAD.format(quantization=str(base)),
            VIT if part.network == 'vit' else RESNET,
            dict(noise=NOISE, images=IMAGES, labels=LABELS)[part.data],
            RUN.format(metric='MultiLabelMetric' if several else 'Accuracy'),
            part.settings,
            JOINT,
        )
    )


def write_project(folder: Path, part: Part) -> None:
    """Write ``config.py``, and ``float.py`` without quantization.

    Args:
        folder: Made if it does not exist; ``images`` lies beside it.
        part: What the config uses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'config.py').write_text(config_text(part))
    (folder / 'float.py').write_text(FLOAT)
    if part.data != 'noise' or part.text:
        write_images(folder.parent / 'images')


def write_images(folder: Path) -> None:
    """A folder of images for each class, ``labels.json``, in which each has
    two labels and a difficult one, and ``tasks.json``, one label by task."""
    if (folder / 'tasks.json').is_file():
        return
    generator = np.random.default_rng(0)
    entries = []
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(FEWEST + label):
            image = generator.integers(256, size=(8, 8, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / name / f'{number}.png'), image)
            entries.append(
                dict(
                    img_path=f'{name}/{number}.png',
                    gt_label=[label, (label + 1) % len(CLASSES)],
                    gt_label_difficult=[(label + 2) % len(CLASSES)],
                )
            )
    content = dict(metainfo=dict(classes=CLASSES), data_list=entries)
    (folder / 'labels.json').write_text(json.dumps(content))
    for entry in entries:
        first, second = entry['gt_label']
        entry['gt_label'] = dict(first=first, second=second % 2)
    content['metainfo'] = dict(tasks=['first', 'second'])
    (folder / 'tasks.json').write_text(json.dumps(content))
