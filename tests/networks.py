"""Small networks that the tests share."""

import logging
from contextlib import contextmanager

import torch
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample
from torch import nn

import mmauxq  # noqa: F401
from mmauxq.algorithms import JointQAT

init_default_scope('mmpretrain')

SHAPE = (1, 8, 8)
QUANTIZERS = dict(
    weight=dict(type='mmauxq.LSQ', bits=2),
    activation=dict(type='mmauxq.LSQ', bits=2),
)
AUX = dict(type='mmauxq.AuxAdaptorAggregator')
SPEED = ('compile', 'cuda_graph', 'memory', 'channels_last')


def classifier(**backbone) -> dict:
    """A residual network of 8 layers for 8 x 8 images, as a config."""
    settings = dict(
        type='mmauxq.CIFARResNet',
        depth=8,
        in_channels=1,
        base_channels=4,
        # with it, no gradient enters a block at the first step
        zero_init_residual=False,
    )
    return dict(
        type='ImageClassifier',
        backbone={**settings, **backbone},
        neck=dict(type='GlobalAveragePooling'),
        head=dict(
            type='LinearClsHead',
            num_classes=10,
            in_channels=4 * (settings | backbone)['base_channels'],
            loss=dict(type='CrossEntropyLoss'),
        ),
        data_preprocessor=dict(num_classes=10, mean=[0.0], std=[1.0]),
    )


class Overwriting(nn.Module):
    """Adds to the output of ``first`` in place, as residual sums do."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 1)
        self.second = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        y = self.first(x)
        y += 1
        return self.second(nn.functional.relu(y))


def joint_qat(seed: int = 0, **settings) -> JointQAT:
    """A small algorithm, initialised; options of its speed by their names."""
    torch.manual_seed(seed)
    speed = {name: settings.pop(name) for name in SPEED if name in settings}
    if any(value is not None for value in speed.values()):
        settings['speed'] = speed
    arguments = dict(
        architecture=classifier(),
        quantizers=QUANTIZERS,
        guidance=AUX,
        input_shape=SHAPE,
    )
    model = JointQAT(**{**arguments, **settings})
    model.init_weights()
    return model


def batch(count: int = 8, seed: int = 0, shape=SHAPE):
    """(inputs, data samples)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, *shape, generator=generator)
    samples = [DataSample().set_gt_label(i % 10) for i in range(count)]
    return inputs, samples


@contextmanager
def captured():
    """Messages of the current mmengine logger."""
    messages = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Keep()
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
