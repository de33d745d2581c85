"""The forms of a config, each through train, test, export and audit."""

from .part import TEST, TRAIN, Part

SHIP = '{mmauxq} export config.py run/slim.pth --images 8 --out ship'
AUDIT = '{mmauxq} audit config.py run/slim.pth --onnx ship/model.onnx'
ALL = (TRAIN, TEST, SHIP, AUDIT)
LAZY = """
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop
from mmpretrain.datasets import CustomDataset, PackInputs
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import (
    CrossEntropyLoss, GlobalAveragePooling, ImageClassifier, LinearClsHead)
from torch.optim import SGD

from mmauxq.algorithms import JointQAT
from mmauxq.backbones import CIFARResNet
from mmauxq.guidance import AuxAdaptorAggregator
from mmauxq.quantizers import LSQ

default_scope = 'mmpretrain'
loader = dict(
    batch_size=4, num_workers=0,
    dataset=dict(
        type=CustomDataset, data_root='../images',
        pipeline=[dict(type=LoadImageFromFile), dict(type=PackInputs)]),
    sampler=dict(type=DefaultSampler, shuffle=False))
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
data_preprocessor = dict(num_classes=3, mean=[127.5] * 3, std=[127.5] * 3)
val_evaluator = dict(type=Accuracy, topk=(1,))
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(type=CheckpointHook))
optim_wrapper = dict(optimizer=dict(type=SGD, lr=0.01))
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=1)
val_cfg = dict()
test_cfg = dict()
architecture = dict(
    type=ImageClassifier,
    backbone=dict(type=CIFARResNet, depth=8, base_channels=4),
    neck=dict(type=GlobalAveragePooling),
    head=dict(
        type=LinearClsHead, num_classes=3, in_channels=16,
        loss=dict(type=CrossEntropyLoss)))
model = dict(
    type=JointQAT, architecture=architecture,
    quantizers=dict(
        weight=dict(type=LSQ, bits=4), activation=dict(type=LSQ, bits=4)),
    guidance=dict(type=AuxAdaptorAggregator))
"""

PARTS = (
    Part('variants/text config', commands=ALL),
    Part('variants/new-style config', text=LAZY, commands=ALL),
    Part('variants/single label', data='images', commands=ALL,
         says='accuracy/top1: '),
    Part('variants/several labels', data='labels', commands=ALL,
         says='multi-label/f1-score: '),
    Part('variants/test --tta', data='images',
         commands=(TRAIN, TEST + ' --tta', SHIP, AUDIT)),
)  # fmt: skip
