"""What has no batch norms is compiled by default, if that works."""

import random

import pytest
import torch
from torch import nn

from mmauxq.accelerate import AcceleratedStep, Speed
from mmauxq.accelerate.compiled import CompiledStep
from mmauxq.accelerate.recording import aliases_of
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


no_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='records kernels of a GPU'
)
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


def test_a_transformer_is_compiled_and_a_network_with_batch_norms_is_not(
    monkeypatch,
):
    asked = []
    monkeypatch.setattr(
        torch, 'compile', lambda f, **options: asked.append(options) or f
    )
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    speed = Speed(channels_last=False)
    step = AcceleratedStep(joint_qat(speed=LAUNCHED), speed)
    assert (step.recorded.step, asked) == (step._fused, [])
    model = joint_qat(speed=LAUNCHED, architecture=VIT, guidance=None)
    plain = joint_qat(speed=LAUNCHED, architecture=VIT, guidance=None)
    with captured() as messages:
        model.step = AcceleratedStep(model, speed)
    assert asked == [dict(dynamic=False)]
    assert messages == [
        'JointQAT: the step is compiled when it runs for the second time, '
        'which may take minutes'
    ]
    for i in range(3):
        found = model.loss(*batch(seed=i))
        expected = plain.loss(*batch(seed=i))
    assert model.step.recorded.step.sizes == {(8, 1, 8, 8)}
    assert torch.equal(found['student.loss'], expected['student.loss'])
    with model.step.eager():
        assert model.step.recorded is None


class Backend:
    """Of torch.compile: runs the graphs that it is given, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        self.graphs += 1
        return module.forward


# the compiler asks quantized weights for their gradients
NOT_A_LEAF = pytest.mark.filterwarnings('ignore:The .grad attribute')


@pytest.fixture(params=[False, True], ids=['', 'grouped weights'])
def compiled_transformer(request, monkeypatch):
    """With weights that are quantized before, as on a GPU, and without."""
    monkeypatch.setattr(
        'mmauxq.accelerate.grouped_weights.wants_kernel',
        lambda weight: request.param,
    )
    torch.compiler.reset()
    model = joint_qat(speed=LAUNCHED, architecture=VIT, guidance=None)
    model.loss(*batch(seed=0))  # sets the scales of the quantizers
    backend = Backend()
    step = AcceleratedStep(
        model, Speed(compile=dict(backend=backend), channels_last=False)
    )
    yield model, step, backend
    assert bool(step.weights.entries) is request.param
    torch.compiler.reset()


@NOT_A_LEAF
def test_a_transformer_is_one_graph(compiled_transformer):
    """mmcv's DropPath decides by a number of NumPy, where the graph broke."""
    model, step, backend = compiled_transformer
    block = model.architecture.backbone.layers[0]
    assert type(block.attn.out_drop.drop_prob) is float
    step._run_compiled(batch()[0])
    assert backend.graphs == 1


@NOT_A_LEAF
def test_a_recording_does_not_compile_anew(compiled_transformer):
    """While it is made, parameters are aliases, and no cast is kept."""
    model, step, backend = compiled_transformer
    images = batch()[0]
    expected = step._run_compiled(images)[0]
    no_cache = torch.autocast('cuda', enabled=False, cache_enabled=False)
    with torch.compiler.set_stance('fail_on_recompile'):
        with aliases_of(model) as aliases, no_cache:
            found = step._run_compiled(images)[0]
            grads = torch.autograd.grad(
                found.sum(), list(aliases.values()), allow_unused=True
            )
        assert torch.is_autocast_cache_enabled()
    assert torch.equal(found, expected)
    assert backend.graphs == 1
    assert all(grad is not None for grad in grads)


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.gpu
@no_gpu
@NOT_A_LEAF
@pytest.mark.filterwarnings('ignore:TensorFloat32 tensor cores')
def test_recorded_is_launched_to_the_bit(dtype):
    """The default for a network without batch norms: compiled and recorded,
    but for the last odd batch."""
    found = []
    for recorded in (False, True):
        torch.compiler.reset()
        model = joint_qat(speed={}, architecture=VIT, guidance=None).cuda()
        if not recorded:
            model.step.recorded = model.step.recorded.step
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        losses = []
        with captured() as messages:
            for i, size in enumerate((8, 8, 8, 8, 3, 8, 8)):
                images, samples = batch(size, i)
                samples = [sample.to('cuda') for sample in samples]
                with torch.autocast('cuda', dtype, enabled=dtype is not None):
                    loss = sum(model.loss(images.cuda(), samples).values())
                loss.backward()
                losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
        assert not [m for m in messages if 'slower' in m]
        found.append((losses, model))
    recording = model.step.recorded.recording
    assert recording.replays == 4  # two steps come before, and one is odd
    (launched, theirs), (replayed, ours) = found
    assert launched == replayed
    theirs = theirs.state_dict()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs[name]), name
