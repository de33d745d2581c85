"""``speed='auto'`` records what it can, and ends no run."""

import random

import pytest
import torch
from torch import nn

from mmauxq.accelerate import AcceleratedStep, Speed, cuda_graph
from mmauxq.accelerate.cuda_graph import GraphedStep
from mmauxq.accelerate.fused_norm import FusedBatchNorms
from tests.networks import batch, captured, classifier, joint_qat

SLOWER = 'JointQAT: steps are launched kernel by kernel, which is slower: '
no_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a CUDA GPU'
)


class FakeRecording:
    """Runs the step as it is, and counts; there is no GPU to record."""

    made = 0

    def __init__(self, step, model, inputs, kind, flat):
        type(self).made += 1
        self.step, self.kind, self.replays = step, kind, 0

    def averages(self, average):
        return False

    def replay(self, inputs, average):
        self.replays += 1
        return self.step(inputs)


class FakeGenerator:
    """That of the GPU; the tests draw from those of the host."""

    def get_state(self):
        return torch.Generator().get_state()

    def graphsafe_set_state(self, generator):
        pass


class OnGPU(torch.Tensor):
    """A tensor of the CPU that says that it is on a GPU."""

    is_cuda = True


def on_gpu(*shape):
    return torch.ones(*shape).as_subclass(OnGPU)


@pytest.fixture
def recording(monkeypatch):
    """A host without a GPU, on which steps are recorded nevertheless."""

    class Made(FakeRecording):
        made = 0

    monkeypatch.setattr(cuda_graph, 'Recording', Made)
    monkeypatch.setattr(
        torch.cuda, 'default_generators', {None: FakeGenerator()}
    )
    monkeypatch.setattr(torch.cuda, 'empty_cache', lambda: None)
    return Made


def graphed(step=lambda x: x * 2, model=None, optional=True):
    return GraphedStep(step, model or nn.Linear(4, 4), optional=optional)


def test_a_size_that_stays_is_recorded(recording):
    step = graphed()
    for _ in range(5):
        step(on_gpu(2, 4))
    assert step.recording.replays == 4 and recording.made == 1
    step(on_gpu(1, 4))
    step(on_gpu(2, 4))
    assert step.recording.replays == 5 and recording.made == 1


def test_sizes_that_keep_changing_are_recorded_ever_less(recording):
    step = graphed()
    for i in range(400):
        step(on_gpu(1 + i // 2 % 2, 4))
    assert recording.made == 2
    recording.made, step = 0, graphed()
    for i in range(400):
        step(on_gpu(1 + i // 8 % 5, 4))
    assert recording.made == 4


@pytest.mark.parametrize('optional', [False, True])
def test_hooks_are_called(recording, optional):
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    step = graphed(model, model, optional)
    handle = model[0].register_forward_hook(lambda *args: seen.append(1))
    with captured() as messages:
        for _ in range(4):
            step(on_gpu(2, 4))
    assert len(seen) == 4 and recording.made == 0
    assert [m for m in messages if m.startswith(SLOWER)] == [
        f'{SLOWER}0 has a hook, which a recording would not call'
    ]
    handle.remove()
    for _ in range(4):
        step(on_gpu(2, 4))
    assert recording.made == 1


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def failing(error):
    def made(step, model, inputs, kind, flat):
        random.random()  # what a step did before it failed
        model.num_batches_tracked.add_(1)
        raise error

    return made


@pytest.mark.parametrize(
    'error, reason',
    [
        (
            RuntimeError('operation not permitted\nwhen capturing'),
            'RuntimeError: operation not permitted when capturing',
        ),
        (
            torch.OutOfMemoryError('Tried to allocate'),
            "the GPU's memory is full; model.speed.memory='codes' needs less",
        ),
        (TypeError('no len()'), 'TypeError: no len()'),
    ],
)
def test_what_cannot_be_recorded_stays_eager(
    recording, monkeypatch, error, reason
):
    monkeypatch.setattr(cuda_graph, 'Recording', failing(error))
    model = nn.BatchNorm1d(4)
    step = graphed(model, model)
    random.seed(3)
    with captured() as messages:
        for _ in range(4):
            out = step(on_gpu(2, 4))
    assert random.random() == random.Random(3).random()
    assert model.num_batches_tracked == 4
    assert torch.equal(out, torch.zeros(2, 4))
    assert [m for m in messages if m.startswith(SLOWER)] == [
        f'{SLOWER}cuda_graph: this step cannot be recorded ({reason}); set '
        'model.speed.cuda_graph=False'
    ]


@pytest.mark.gpu
@no_gpu
def test_calls_counted_on_the_host_are_not_recorded():
    layer = Counting(4, 4).cuda()
    step = graphed(layer, layer)
    with captured() as messages:
        for _ in range(4):
            step(torch.ones(2, 4, device='cuda'))
    assert any('counts its calls on the host' in m for m in messages)
    assert layer.calls == 5  # the failed recording is one of them


def test_what_needs_the_memory_of_a_recording_gets_it(recording):
    model = nn.BatchNorm1d(4)
    step = graphed(model, model)
    for _ in range(3):
        step(on_gpu(2, 4))
    calls = []

    def run():
        calls.append(step.recording is None)
        model.num_batches_tracked.add_(1)
        random.random()
        if step.recording is not None:
            raise torch.OutOfMemoryError('Tried to allocate')
        return 'done'

    random.seed(3)
    assert step.beside(run) == 'done'
    assert calls == [False, True]
    assert model.num_batches_tracked == 4
    once = random.Random(3)
    once.random()
    assert random.random() == once.random()
    with pytest.raises(torch.OutOfMemoryError):
        step.beside(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError()))


@pytest.fixture
def auto(monkeypatch):
    """Gives a model the step that it has on a GPU if nothing is said."""

    def give(model):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, 'is_available', lambda: True)
            return AcceleratedStep(model, Speed(channels_last=False))

    return give


def test_a_loss_of_its_own_is_eager(auto):
    head = dict(type='ArcFaceClsHead', num_classes=10, in_channels=16)
    model = joint_qat(
        speed={}, architecture=dict(classifier(), head=head), guidance=None
    )
    with captured() as messages:
        step = auto(model)
    assert step.recorded is None
    assert [m for m in messages if m.startswith(SLOWER)] == [
        f'{SLOWER}the loss of a ArcFaceClsHead in a ImageClassifier needs '
        'more than logits'
    ]


def test_batch_norms_that_cannot_be_fused_run_by_themselves(auto, monkeypatch):
    model, plain = joint_qat(speed={}), joint_qat(speed={})
    monkeypatch.setattr(
        'mmauxq.accelerate.step.has_kernels', lambda inputs: True
    )
    monkeypatch.setattr(
        FusedBatchNorms,
        'plan',
        lambda *args: (_ for _ in ()).throw(ValueError('no such graph')),
    )
    model.step = auto(model)
    model.step.recorded.plain = model.step._fused  # there is no GPU
    with captured() as messages:
        for i in range(2):
            found = model.loss(*batch(seed=i))
            expected = plain.loss(*batch(seed=i))
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        assert torch.equal(found[name], loss), name
    theirs = plain.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    said = 'JointQAT: batch norms run by themselves, which is slower: '
    assert [m for m in messages if 'by themselves' in m] == [
        f'{said}ValueError: no such graph'
    ]


@pytest.mark.gpu
@no_gpu
def test_a_network_without_batch_norms_is_recorded():
    """What has no batch norm to fuse is found out once, not while a step is
    recorded."""
    model = joint_qat(
        architecture=dict(
            type='ImageClassifier',
            backbone=dict(
                type='VisionTransformer', img_size=32, patch_size=8,
                arch=dict(embed_dims=16, num_layers=2, num_heads=2,
                          feedforward_channels=32),
            ),
            head=dict(
                type='VisionTransformerClsHead', num_classes=10, in_channels=16
            ),
        ),
        guidance=None, input_shape=(3, 32, 32), cuda_graph=True,
    ).cuda()  # fmt: skip
    images = torch.randn(4, 3, 32, 32, device='cuda')
    samples = [sample.to('cuda') for sample in batch(4)[1]]
    with captured() as messages:
        for _ in range(4):
            sum(model.loss(images, samples).values()).backward()
    assert not any(SLOWER in m for m in messages)
    assert model.step.recorded.recording.replays == 3


def test_batch_norms_are_looked_for_once(auto, monkeypatch):
    monkeypatch.setattr(
        'mmauxq.accelerate.step.has_kernels', lambda inputs: True
    )
    model = joint_qat(speed={})
    model.step = auto(model)
    model.step.recorded.plain = model.step._fused  # there is no GPU
    passes = []
    monkeypatch.setattr(
        model.step, '_find_fusions', lambda few: passes.append(len(few))
    )
    for i in range(3):
        model.loss(*batch(seed=i))
    assert passes == [2]


def test_a_failed_attempt_is_the_plain_step_from_then_on(
    recording, monkeypatch
):
    """Not the fused one, which makes the host slower."""
    monkeypatch.setattr(cuda_graph, 'Recording', failing(TypeError('no')))
    model, calls = nn.BatchNorm1d(4), []

    def fused(x):
        calls.append('fused')

    def plain(x):
        calls.append('plain')

    step = GraphedStep(fused, model, plain, optional=True)
    for size in (2, 2, 2, 3, 3):
        step(on_gpu(size, 4))
    assert calls == ['fused', 'plain', 'plain', 'plain', 'plain']
