"""A recorded step is the eager one; what cannot be recorded is refused."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from mmauxq.accelerate.cuda_graph import GraphedStep, _kind
from mmauxq.accelerate.recording import aliases_of, check_leaves
from mmauxq.accelerate.watched import Watched
from mmauxq.errors import UsageError
from mmauxq.restoring import host_state
from tests.networks import AUX, batch, captured, classifier, joint_qat

KD = dict(type='mmauxq.KnowledgeDistillation')
DSN = dict(type='mmauxq.IntermediateClassifiers')
BWR = dict(type='mmauxq.BlockReplacement')

FEATURES = dict(
    features=dict(type='mmrazor.ATLoss', loss_weight=10.0), taps='stage_ends'
)
no_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs a CUDA GPU'
)
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def data(count=8, seed=0):
    inputs, samples = batch(count, seed)
    return inputs.to(DEVICE), [sample.to(DEVICE) for sample in samples]


def train(cuda_graph, sizes=(8,) * 6, dtype=None, every=1, **settings):
    """Losses of some steps, and what they make of the model."""
    model = joint_qat(cuda_graph=cuda_graph, **settings).to(DEVICE)
    if not cuda_graph:  # the same kernels, launched one by one
        model.step.recorded = model.step._fused
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    history = []
    for i, size in enumerate(sizes):
        inputs, samples = data(size, seed=i)
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            losses = model.loss(inputs, samples)
        sum(losses.values()).backward()
        history.append({n: v.item() for n, v in losses.items()})
        if (i + 1) % every == 0:
            optimizer.step()
            optimizer.zero_grad()
    return history, model


@pytest.fixture
def deterministic():
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        yield


def same(found, expected):
    assert found[0] == expected[0]
    theirs = dict(expected[1].state_dict())
    for name, value in found[1].state_dict().items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(guidance=None, memory='codes'),
        dict(memory='recompute', dtype=torch.bfloat16),
        dict(dtype=torch.float16),
        dict(guidance=[AUX, KD]),
        dict(guidance=DSN),
        dict(guidance=BWR),
        dict(guidance=BWR, dtype=torch.bfloat16, memory='codes'),
        dict(guidance=dict(AUX, separate_bn=True)),
        dict(every=3),
        dict(sizes=(8, 8, 8, 5, 8, 8, 3, 8)),
        dict(sizes=(8, 8, 4, 4, 8, 4, 4, 8, 8)),
    ],
    ids=[
        'aux', 'codes', 'recompute', 'float16', 'two', 'dsn', 'bwr',
        'bwr, codes', 'own norms', 'accumulated', 'other sizes',
        'size for good',
    ],
)  # fmt: skip
@pytest.mark.gpu
@no_gpu
def test_recorded_is_eager_to_the_bit(settings, deterministic):
    expected = train(False, **settings)
    found = train(True, **settings)
    same(found, expected)
    recording = found[1].step.recorded.recording
    assert recording.replays >= 1
    # which is what both have in common, and must not be nothing
    assert found[1].step.fused_norms.fusions


@pytest.mark.parametrize('kind', ['backward', 'accumulated'])
@pytest.mark.gpu
@no_gpu
def test_hooks_of_a_parameter_are_called(kind, deterministic):
    """From the step on in which they come; numbers stay the same."""
    seen: list = []
    found = []
    for hooked in (False, True):
        model = joint_qat(cuda_graph=True).to(DEVICE)
        inputs, samples = data()
        weight = model.architecture.backbone.layer1[0].conv1.weight
        for step in range(5):
            if hooked and step == 3:
                if kind == 'backward':
                    weight.register_hook(lambda grad: seen.append(grad.sum()))
                else:
                    weight.register_post_accumulate_grad_hook(
                        lambda p: seen.append(p.grad.sum())
                    )
            losses = model.loss(inputs, samples)
            sum(losses.values()).backward()
        assert model.step.recorded.recording.replays == 4
        found.append([p.grad for p in model.parameters()])
        expected = weight.grad
    assert len(seen) == 2  # both steps add to what was there
    if kind == 'accumulated':
        assert seen[1] == expected.sum()
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.gpu
@no_gpu
def test_what_changes_the_step_is_recorded_anew():
    model = joint_qat(cuda_graph=True).to(DEVICE)
    inputs, samples = data()

    def step():
        model.zero_grad()
        losses = model.loss(inputs, samples)
        sum(losses.values()).backward()
        return model.step.recorded.recording

    first = [step() for _ in range(4)][-1]
    assert first.replays == 3
    frozen = model.architecture.backbone.layer1[0].conv1.weight
    frozen.requires_grad_(False)
    norm = model.architecture.backbone.layer1[0].bn1.eval()
    mean = norm.running_mean.clone()
    last = [step() for _ in range(3)][-1]
    assert last is not first and last.replays == 2
    assert frozen.grad is None
    assert torch.equal(norm.running_mean, mean)


@pytest.mark.gpu
@no_gpu
def test_a_parameter_that_a_module_keeps_elsewhere():
    class Hidden(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.kept = [self.weight]

        def forward(self, x):
            return nn.functional.linear(x, self.kept[0], self.bias)

    layer = Hidden()
    layer.weight.data, layer.bias.data = (
        p.data.cuda() for p in (layer.weight, layer.bias)
    )
    step = GraphedStep(layer, layer)
    inputs = torch.ones(2, 4, device='cuda')
    step(inputs)
    with pytest.raises(UsageError, match=r'of shape \(4, 4\) outside of its'):
        step(inputs)
    assert layer.weight is layer.kept[0]


@pytest.mark.gpu
@no_gpu
def test_random_numbers_go_on():
    layer = nn.Sequential(nn.Linear(64, 64), nn.Dropout()).cuda()
    step = GraphedStep(layer, layer)
    inputs = torch.ones(8, 64, device='cuda')
    torch.manual_seed(0)
    found = [step(inputs).detach().clone() for _ in range(4)]
    assert step.recording.replays == 3
    torch.manual_seed(0)
    for one in found:
        assert torch.equal(layer(inputs), one)


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize(
    'between, message',
    [
        (lambda x: x * random.random(), 'draws random numbers on the host'),
        (lambda x: x * x.sum().item(), 'this step cannot be recorded'),
    ],
)
def test_what_cannot_be_recorded_is_one_line(between, message):
    layer = nn.Linear(4, 4).cuda()
    step = GraphedStep(lambda x: between(layer(x)), layer)
    inputs = torch.ones(2, 4, device='cuda')
    step(inputs)
    torch.cuda.manual_seed(3)
    with pytest.raises(UsageError, match=message) as error:
        step(inputs)
    assert '\n' not in str(error.value)
    # and the process can go on: numbers are drawn, other steps recorded
    drawn = torch.rand(5, device='cuda')
    torch.cuda.manual_seed(3)
    assert torch.equal(drawn, torch.rand(5, device='cuda'))
    other = GraphedStep(layer, layer)
    for _ in range(3):
        out = other(inputs)
    assert other.recording is not None
    assert torch.equal(out, layer(inputs))


@pytest.mark.gpu
@no_gpu
def test_two_steps_before_a_backward_pass():
    layer = nn.Linear(4, 4).cuda()
    step = GraphedStep(layer, layer)
    inputs = torch.ones(2, 4, device='cuda')
    outputs = [step(inputs) for _ in range(3)]
    with pytest.raises(RuntimeError, match='another step ran before'):
        outputs[1].sum().backward()
    outputs[2].sum().backward()
    assert torch.equal(layer.bias.grad, torch.full_like(layer.bias, 2))


def test_without_a_gpu_it_is_said_once_and_eager(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with captured() as messages:
        model = joint_qat(cuda_graph=True)
    assert sum('cuda_graph has no effect' in m for m in messages) == 1
    plain = joint_qat()
    inputs, samples = batch()
    for _ in range(3):
        found = model.loss(inputs, samples)
        expected = plain.loss(inputs, samples)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        assert torch.equal(found[name], loss)


@pytest.mark.parametrize('grad', [False, True])
def test_on_a_cpu_a_step_is_never_recorded(grad):
    seen = []
    step = GraphedStep(lambda x: seen.append(x) or x * 2, nn.Linear(1, 1))
    inputs = torch.ones(2)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            assert step(inputs).tolist() == [2, 2]
    assert all(x is inputs for x in seen) and len(seen) == 3


def test_what_makes_two_steps_differ():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    x = torch.ones(2, 4)

    def kind(x):
        return _kind(x, Watched(model))

    first = kind(x)
    assert kind(x.clone()) == first
    assert kind(x[:1]) != first
    assert kind(x.t().contiguous().t()) != first
    assert kind(x.double()) != first
    model[2].eval()
    assert kind(x) != first
    model[2].train()
    model[0].bias.requires_grad_(False)
    assert kind(x) != first
    model[0].bias.requires_grad_(True)
    assert kind(x) == first
    model[1].running_mean.data = torch.zeros(4)
    assert kind(x) != first


@pytest.mark.parametrize(
    'draw', [random.random, np.random.rand, lambda: torch.rand(1)]
)
def test_random_numbers_of_the_host_leave_a_trace(draw):
    before = host_state()
    assert host_state() == before
    draw()
    assert host_state() != before


def test_others_stand_in_for_parameters():
    """In the same memory, once each, and also if the step raises."""
    shared, frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
    model = nn.Sequential(shared, frozen, nn.Sequential(shared))
    weight, still = shared.weight, frozen.weight
    with (
        pytest.raises(RuntimeError, match='stop'),
        aliases_of(model) as found,
    ):
        assert shared.weight is found[weight] is not weight
        assert shared.weight.data_ptr() == weight.data_ptr()
        assert frozen.weight is still and len(found) == 2
        raise RuntimeError('stop')
    assert shared.weight is weight and frozen.weight is still


def test_what_is_trained_must_stand_in_its_place():
    layer, kept = nn.Linear(4, 3), nn.Parameter(torch.ones(3))
    with aliases_of(layer) as found:
        y = layer(torch.ones(2, 4)).relu()
        check_leaves([y], found.values())
        with pytest.raises(UsageError, match=r'of shape \(3,\) outside of'):
            check_leaves([y, y * kept], found.values())


@pytest.mark.gpu
@no_gpu
def test_numbers_that_a_hook_schedules_count(deterministic):
    """As a schedule of momentum, or of the weights of distances, does."""

    def steps(recorded):
        model = joint_qat(guidance=dict(KD, **FEATURES), cuda_graph=recorded)
        model.to(DEVICE)
        if not recorded:
            model.step.recorded = model.step._fused
        history = []
        for i in range(9):
            if i == 4:
                for module in model.modules():
                    if isinstance(module, nn.BatchNorm2d):
                        module.momentum = 0.5
                model.guidance.betas = [0.25] * len(model.guidance.betas)
            losses = model.loss(*data(seed=i))
            sum(losses.values()).backward()
            history.append({n: v.item() for n, v in losses.items()})
        return history, model

    expected, found = steps(False), steps(True)
    same(found, expected)
    assert found[1].step.recorded.recording.replays == 4


@pytest.mark.gpu
@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
@no_gpu
def test_activation_checkpointing_is_named():
    model = joint_qat(
        architecture=dict(
            classifier(),
            backbone=dict(
                type='ResNet', depth=18, in_channels=1, stem_channels=4,
                base_channels=4, with_cp=True,
            ),
            head=dict(type='LinearClsHead', num_classes=10, in_channels=32),
        ),
        guidance=None, input_shape=(1, 32, 32), cuda_graph=True,
    ).to(DEVICE)  # fmt: skip
    inputs = torch.randn(8, 1, 32, 32, device=DEVICE, requires_grad=True)
    _, samples = data()
    with pytest.raises(UsageError, match='with_cp=False'):
        for _ in range(3):
            sum(model.loss(inputs, samples).values()).backward()


def changed_momentum(model):
    model.architecture.backbone.bn1.momentum = 0.3


def changed_bits(model):
    model.architecture.backbone.layer1[0].conv1.input_quantizer.bits = 4


def changed_betas(model):
    model.guidance.betas = [0.5, *model.guidance.betas[1:]]


def changed_mode(model):
    model.architecture.backbone.layer1.eval()


def changed_teacher(model):
    for buffer in model.guidance.teacher.buffers():
        buffer.data = buffer.data.clone()


def changed_parameter(model):
    conv = model.architecture.backbone.conv1
    conv.weight = nn.Parameter(conv.weight.detach().clone())


def changed_module(model):
    model.architecture.backbone.bn1 = nn.BatchNorm2d(4)


@pytest.mark.parametrize(
    'change',
    [changed_momentum, changed_bits, changed_betas, changed_mode,
     changed_teacher, changed_parameter, changed_module],
)  # fmt: skip
def test_what_a_recording_holds_fixed_is_watched(change):
    model = joint_qat(guidance=dict(KD, **FEATURES))
    watched = Watched(model)
    before = watched.state()
    assert watched.state() == before and not watched.is_outdated()
    change(model)
    assert watched.is_outdated() or watched.state() != before
