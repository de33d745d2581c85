"""What has no batch norms is compiled by default, if that works."""

import random

import torch
from torch import nn

from mmauxq.accelerate import AcceleratedStep, Speed
from mmauxq.accelerate.compiled import CompiledStep
from tests.networks import batch, captured, joint_qat


def images(count):
    return torch.ones(count, 4)


def test_sizes_that_come_again_are_compiled():
    calls = []
    step = CompiledStep(
        lambda x: calls.append(('compiled', len(x))),
        lambda x: calls.append(('other', len(x))),
        nn.Identity(),
    )
    for count in (8, 8, 8, 5, 8, 5, 5):
        step(images(count))
    with torch.no_grad():
        step(images(3))
        step(images(3))
    assert calls == [
        ('other', 8), ('compiled', 8), ('compiled', 8), ('other', 5),
        ('compiled', 8), ('other', 5), ('compiled', 5), ('other', 3),
        ('other', 3),
    ]  # fmt: skip


def test_hooks_are_called():
    model, calls = nn.Sequential(nn.Identity()), []
    step = CompiledStep(
        lambda x: calls.append('compiled'),
        lambda x: calls.append('other'),
        model,
    )
    for _ in range(2):
        step(images(2))
    handle = model[0].register_forward_hook(lambda *args: None)
    step(images(2))
    handle.remove()
    step(images(2))
    assert calls == ['other', 'compiled', 'other', 'compiled']


def test_a_compiler_that_fails_is_asked_once():
    model, calls = nn.BatchNorm1d(4), []

    def compiled(x):
        calls.append('compiled')
        model.num_batches_tracked.add_(1)
        random.random()
        raise RuntimeError('no C compiler\nwas found')

    def other(x):
        calls.append('other')
        return model(x)

    step = CompiledStep(compiled, other, model)
    random.seed(3)
    with captured() as messages:
        for _ in range(4):
            out = step(images(2))
    assert calls == ['other', 'compiled', 'other', 'other', 'other']
    assert out.shape == (2, 4)
    assert model.num_batches_tracked == 4
    assert random.random() == random.Random(3).random()
    assert [m for m in messages if 'not compiled' in m] == [
        'JointQAT: the step is not compiled, which may be slower: '
        'RuntimeError: no C compiler was found'
    ]


LAUNCHED = dict(cuda_graph=False, channels_last=False)
VIT = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer', img_size=8, patch_size=4, in_channels=1,
        arch=dict(embed_dims=8, num_layers=1, num_heads=2,
                  feedforward_channels=16),
    ),
    head=dict(type='VisionTransformerClsHead', num_classes=10, in_channels=8),
)  # fmt: skip


def test_a_transformer_is_compiled_and_a_network_with_batch_norms_recorded(
    monkeypatch,
):
    asked = []
    monkeypatch.setattr(
        torch, 'compile', lambda f, **options: asked.append(options) or f
    )
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    speed = Speed(channels_last=False)
    step = AcceleratedStep(joint_qat(speed=LAUNCHED), speed)
    assert (step.tried, asked) == (None, [])
    model = joint_qat(speed=LAUNCHED, architecture=VIT, guidance=None)
    plain = joint_qat(speed=LAUNCHED, architecture=VIT, guidance=None)
    model.step = AcceleratedStep(model, speed)
    assert asked == [dict(dynamic=False)]
    for i in range(3):
        found = model.loss(*batch(seed=i))
        expected = plain.loss(*batch(seed=i))
    assert model.step.tried.sizes == {(8, 1, 8, 8)}
    assert torch.equal(found['student.loss'], expected['student.loss'])
    with model.step.eager():
        assert model.step.tried is None
