"""Batch norms that run as one with what follows them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmauxq.accelerate import fused_norm, recompute
from mmauxq.accelerate.fused_norm import (
    ADD,
    QUANTIZE,
    RELU,
    UNFUSED,
    DeferredTensor,
    FusedBatchNorms,
    Fusion,
    materialize,
)
from mmauxq.accelerate.kernels import norm as norm_module
from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.accelerate.kernels.norm import batch_statistics
from mmauxq.accelerate.kernels.packed import PackedTensor
from mmauxq.accelerate.recompute import Recompute
from mmauxq.guidance import TapRecorder
from mmauxq.quantizers.functional import learned_step_quantize
from tests.networks import AUX, batch, classifier, joint_qat

OWN = dict(AUX, separate_bn=True)
# with 4 channels torch 2.11.0 corrupts the heap; see test_step.py
NETWORK = dict(
    architecture=classifier(base_channels=8),
    channels_last=True,
    # Triton's interpreter takes longest for the channels of the last layers
    policy=dict(layers={'backbone.layer3.*': dict(weight=32)}),
)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Convolutions of float32 keep all its bits."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


class Quantize(nn.Module):
    def __init__(self, step=0.3):
        super().__init__()
        self.step = nn.Parameter(torch.tensor(step))

    def forward(self, x):
        return learned_step_quantize(x, self.step, 0, 15, grad_scale=0.1)


class Network(nn.Module):
    """Two batch norms, with what a test puts between and after them."""

    def __init__(self, between, relu=None, product=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.product = nn.Conv2d(3, 8, 1, bias=False) if product else None
        self.norm = nn.BatchNorm2d(8)
        self.relu = relu or nn.ReLU()
        self.quantize = Quantize()
        self.last = nn.Conv2d(8, 4, 1)
        self.between = between

    def forward(self, x):
        z = self.conv(x)
        before = z if self.product is None else self.product(x)
        return self.last(self.between(self, self.norm(before), z))


def quantized(net, x, z):
    return net.quantize(net.relu(x))


def signed(net, x, z):
    return net.quantize(x)


def summed(net, x, z):
    x += z
    return net.relu(x)


def summed_first(net, x, z):
    return z + x


def residual(net, x, z):
    """As a block begins: the sum is quantized, and kept for the next sum."""
    x = net.relu(x + z)
    return net.quantize(x) + x


def residual_of_another(net, x, z):
    """What is added is no result of the convolution."""
    return residual(net, x, z.tanh())


def residual_first(net, x, z):
    """Without a ReLU, as before a pre-activation."""
    x = x + z
    return net.quantize(x) + x


def quantized_twice(net, x, z):
    """As where a block has a projection."""
    x = net.relu(x + z)
    return net.quantize(x) * 0.5 + net.quantize(x)


def rectified(net, x, z):
    x = net.relu(x)
    return net.quantize(x) + x


def read_twice(net, x, z):
    return net.quantize(net.relu(x)) + x.mean()


def other(net, x, z):
    return F.silu(x)


def stacked(net, x, z):
    return torch.cat([x[:, :4], x[:, 4:]], 1)


def run(between, steps=3, memory=None, chained=True, relu=None, products=None):
    torch.manual_seed(0)
    net = Network(between, relu, products is not None).to(DEVICE)
    net = net.to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 6, 5, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    chains = FusedBatchNorms(bool(products))
    if not chained:
        chains.fusions = {}
    with use_form('kernel'):
        for _ in range(steps):
            net.zero_grad()
            if memory is None:
                with chains:
                    y = net(x)
                    chains.plan([y])
            else:
                with Recompute(memory), chains:
                    y = net(x)
                    chains.plan([y])
            y.square().sum().backward()
    state = {n: p.grad for n, p in net.named_parameters()}
    state.update(net.named_buffers(), x=x.grad)
    return y.detach(), state, chains


def close(found, expected, name):
    """Up to the rounding of sums, which may be small beside their terms."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        found, expected, rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=name
    )


class Relu6(nn.Module):
    def forward(self, x):
        return F.relu6(x)


@pytest.mark.parametrize(
    'relu',
    [
        nn.ReLU(), nn.ReLU(inplace=True), nn.Hardtanh(0, 0.5),
        nn.Hardtanh(0, 0.5, inplace=True), nn.ReLU6(), Relu6(),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    'between, link',
    [
        (quantized, Fusion(QUANTIZE, True)),
        (signed, Fusion(QUANTIZE, False)),
        (summed, Fusion(ADD, True)),
        (summed_first, Fusion(ADD, False)),
        (residual, Fusion(ADD, True, True)),
        (residual_first, Fusion(ADD, False, True)),
        (quantized_twice, Fusion(ADD, True, True)),
        (rectified, Fusion(RELU, True)),
        (read_twice, Fusion(UNFUSED, False)),
        (other, Fusion(UNFUSED, False)),
        (stacked, Fusion(UNFUSED, False)),
    ],
)
def test_finds_the_chain_and_changes_nothing(between, link, relu):
    if getattr(relu, 'inplace', False) and between is read_twice:
        pytest.skip('what is read would be overwritten')
    y, state, _ = run(between, chained=False, relu=relu)
    found, found_state, chains = run(between, relu=relu)
    assert list(chains.fusions.values()) == [link]
    torch.testing.assert_close(found, y)
    for name, value in state.items():
        if value is not None:
            close(found_state[name], value, name)


@pytest.mark.parametrize(
    'between',
    [
        quantized, signed, summed, summed_first, residual, residual_first,
        quantized_twice, rectified, read_twice, other, stacked,
        residual_of_another,
    ],
)  # fmt: skip
def test_with_a_product_nothing_changes(between, monkeypatch):
    y, state, _ = run(between, chained=False, products=False)
    monkeypatch.setattr(fused_norm, 'PRODUCT_DTYPES', (torch.float32,))
    used = []
    backward = norm_module.product_norm_backward
    monkeypatch.setattr(
        norm_module,
        'product_norm_backward',
        lambda *args: used.append(1) or backward(*args),
    )
    found, found_state, _ = run(between, products=True)
    assert len(used) == 2  # the first step is only observed
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)
    for name, value in state.items():
        if value is not None:
            close(found_state[name], value, name)


class ReadTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = (
            nn.Conv2d(2, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )

    def forward(self, x):
        z = self.conv(x)
        return self.norm(z).relu() + z.tanh()


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        z = F.conv2d(input=x, weight=self.conv.weight, stride=1)
        return self.norm(z)


def test_a_product_with_another_reader_is_computed(monkeypatch):
    monkeypatch.setattr(fused_norm, 'PRODUCT_DTYPES', (torch.float32,))
    net, norms = ReadTwice().to(DEVICE), FusedBatchNorms(products=True)
    x = torch.rand(2, 2, 4, 4, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    with use_form('kernel'), norms:
        norms.plan([net(x)])
        assert type(net.conv(x)) is torch.Tensor


def test_a_convolution_with_keywords(monkeypatch):
    monkeypatch.setattr(fused_norm, 'PRODUCT_DTYPES', (torch.float32,))
    net, norms = Keywords().to(DEVICE), FusedBatchNorms(products=True)
    x = torch.rand(2, 2, 4, 4, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    with use_form('kernel'):
        with norms:
            expected = net(x)
            norms.plan([expected])
        with norms:
            z = F.conv2d(input=x, weight=net.conv.weight)
            assert isinstance(z, fused_norm.DeferredProduct)
            torch.testing.assert_close(net.norm(z), expected)


def test_a_deferred_product_is_taken_for_the_tensor():
    x, w = torch.rand(2, 2, 4, 4), torch.rand(8, 2, 1, 1, requires_grad=True)
    z = F.conv2d(x, w)
    memory = torch.empty_like(z).requires_grad_()
    deferred = fused_norm.DeferredProduct(x, w, memory)
    assert deferred.shape == z.shape and deferred.dim() == 4
    assert deferred.value is None
    for found, value in [
        (deferred + 1, z + 1), (torch.tanh(deferred), z.tanh()),
        (deferred[:, 1], z[:, 1]), (deferred.mean(), z.mean()),
        (torch.cat([deferred, z]), torch.cat([z, z])),
    ]:  # fmt: skip
        torch.testing.assert_close(found, value, rtol=0, atol=0)
    deferred.sum().backward()
    expected = x.sum((0, 2, 3))[None, :, None, None].expand_as(w)
    torch.testing.assert_close(w.grad, expected)


@pytest.mark.parametrize(
    'between, op, has_identity, rectified',
    [
        (quantized, 'normalise_quantize', False, True),
        (signed, 'normalise_quantize', False, False),
        (summed, 'normalise', True, True),
        (summed_first, 'normalise', True, False),
        (residual, 'norm_add_relu_quantize', True, True),
        (residual_first, 'norm_add_relu_quantize', True, False),
        (quantized_twice, 'norm_add_relu_quantize', True, True),
        (rectified, 'normalise', False, True),
        (other, 'normalise', False, False),
    ],
)
def test_a_chain_is_one_operation(
    between, op, has_identity, rectified, monkeypatch
):
    """And what it takes in is not done again."""
    seen = []

    def noted(name):
        before = getattr(fused_norm, name)

        def call(z, norm, *args):
            identity = None if name == 'normalise_quantize' else args[0]
            flag = args[0] if name == 'normalise_quantize' else args[1]
            seen.append((name, identity is not None, flag == 6))
            return before(z, norm, *args)

        monkeypatch.setattr(fused_norm, name, call)

    for name in ('normalise', 'normalise_quantize', 'norm_add_relu_quantize'):
        noted(name)
    run(between, steps=3, relu=nn.ReLU6())  # the first one looks on
    assert seen == [(op, has_identity, rectified)] * 2


@pytest.mark.parametrize('memory', ['codes', 'recompute'])
@pytest.mark.parametrize(
    'between',
    [
        quantized,
        summed,
        residual,
        residual_of_another,
        residual_first,
        rectified,
    ],
)
def test_with_less_memory_to_the_bit(between, memory):
    y, state, _ = run(between)
    found, found_state, _ = run(between, memory=memory)
    assert torch.equal(found, y)
    for name, value in state.items():
        assert value is None or torch.equal(found_state[name], value), name


def test_a_quantized_sum_ends_in_codes(monkeypatch):
    """With a product behind it, which is not computed for the next one."""
    ends = []
    remember = Recompute._remember

    def noted(self, func, recipe, *args):
        ends.append((func is learned_step_quantize, recipe.products))
        return remember(self, func, recipe, *args)

    of = []
    monkeypatch.setattr(Recompute, '_remember', noted)
    monkeypatch.setattr(
        recompute,
        'PackedTensor',
        lambda *a: of.append(a) or PackedTensor(*a),
    )
    run(residual_of_another, steps=2, memory='recompute')
    assert ends.count((True, 1)) == len(of) == 2


@pytest.mark.parametrize(
    'first, later',
    [
        (quantized, other),
        (quantized, stacked),
        (quantized, read_twice),
        (quantized, rectified),
        (residual, summed),
        (residual, stacked),
        (residual, quantized),
    ],
)
def test_another_path_than_the_one_that_was_seen(first, later):
    """What waits becomes a tensor where an unknown function reads it."""
    paths = iter([first, later, later])

    def changing(net, x, z):
        return next(paths)(net, x, z)

    found, state, chains = run(changing, steps=2)
    assert [link.kind for link in chains.fusions.values()] != [UNFUSED]
    paths = iter([first, later])
    y, expected, _ = run(changing, steps=2, chained=False)
    torch.testing.assert_close(found, y)
    for name, value in expected.items():
        if value is not None:
            close(state[name], value, name)


def test_a_pending_result_has_a_shape_and_a_place():
    z = torch.randn(2, 3, 4, 5)
    pending = DeferredTensor(z, None, Fusion(QUANTIZE, True))
    assert pending.shape == z.shape
    assert (pending.dim(), pending.numel()) == (4, z.numel())
    assert (pending.dtype, pending.device) == (z.dtype, z.device)
    assert pending.value is None


def test_a_tap_of_a_module_that_gives_several():
    """Deferred tensors among them are in their place."""
    z = torch.randn(2, 3, 4, 5)
    value, other = torch.ones_like(z), torch.zeros(2, 7)
    model = nn.Sequential(nn.Identity())
    pending = DeferredTensor(z, None, Fusion(ADD, True, True), value=value)
    for kept, expected in (((0, 1), [value, other]), ((1,), [other])):
        recorder = TapRecorder(model, ['0'], parts={'0': kept})
        recorder.materialize = materialize
        with recorder:
            model((pending, other))
        found = list(recorder.outputs().values())
        assert all(a is b for a, b in zip(found, expected, strict=True))
    pending.tap = value * 2
    with TapRecorder(model, ['0']) as recorder:
        model(pending)
    recorder.materialize = materialize
    assert recorder.changed() == []
    assert recorder.outputs()['0'] is pending.tap


def pending(link):
    """A batch norm's result that waits, the plain one, and its input."""
    z = torch.randn(2, 8, 3, 5, device=DEVICE)
    z = z.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.rand(8, device=DEVICE) + 1, torch.randn(8).to(DEVICE)
    norm = batch_statistics(z.detach(), weight, bias, None, None, 0.1, 1e-5)
    plain = F.batch_norm(z, None, None, weight, bias, True, 0.1, 1e-5)
    return DeferredTensor(z, norm, link), plain, z


@pytest.mark.parametrize(
    'apply',
    [
        lambda x: x[:, 2:4],
        lambda x: torch.stack(list(x)) * len(x),
        lambda x: -x,
        lambda x: x - 2,
        lambda x: 2 - x,
        lambda x: x * 2,
        lambda x: 2 * x,
        lambda x: x / 3,
        lambda x: 3 / (abs(x) + 1),
        lambda x: x**2,
        lambda x: x @ x.mT,
        lambda x: x - x.relu() * x,
        lambda x: torch.where((x < 0.5) & (x >= -1), x, 0),
        lambda x: torch.where((x > 0.5) | (x <= -1), x, 0),
        lambda x: torch.add(x, x, alpha=0.5),
        lambda x: torch.maximum(x, torch.ones_like(x)),
        lambda x: torch.abs(input=x),
        lambda x: torch.where(x > 0, input=x, other=0.0),
        lambda x: (x.mul_(2), F.relu(x))[1],
    ],
)
@pytest.mark.parametrize('kind', [QUANTIZE, ADD])
def test_what_waits_takes_part_in_any_expression(apply, kind):
    waits, plain, z = pending(Fusion(kind, True))
    found, expected = apply(waits), apply(plain)
    assert torch.is_tensor(found)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    (ours,) = torch.autograd.grad(found, z, upstream)
    (theirs,) = torch.autograd.grad(expected, z, upstream)
    close(ours, theirs, 'z')


def test_what_waits_has_no_other_dunder_of_a_tensor():
    """Or copying and NumPy would take z for it."""
    waits, _, _ = pending(Fusion(QUANTIZE, True))
    with pytest.raises(AttributeError, match='__array__'):
        waits.__array__  # noqa: B018
    assert waits.value is None


@pytest.mark.parametrize(
    'link', [Fusion(ADD, False), Fusion(ADD, True), Fusion(ADD, False, True)]
)
def test_a_sum_with_another_layout(link):
    """It waits if something is to follow."""
    waits, plain, z = pending(link)
    other = torch.randn(2, 8, 3, 5, device=DEVICE, requires_grad=True)
    assert other.stride() != z.stride()
    found = waits + other
    assert isinstance(found, DeferredTensor) == (link.relu or link.quantized)
    found, expected = materialize(found), plain + other
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(found, (z, other), upstream)
    theirs = torch.autograd.grad(expected, (z, other), upstream)
    close(ours[0], theirs[0], 'z')
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize('other', [2.0, torch.ones(8, 1, 1).to(DEVICE)])
def test_a_sum_with_something_smaller(other):
    waits, plain, _ = pending(Fusion(ADD, True, True))
    found = waits + other
    assert torch.is_tensor(found)
    torch.testing.assert_close(found, plain + other)


def test_a_tap_of_a_quantized_sum_has_a_gradient_of_its_own():
    waits, plain, z = pending(Fusion(ADD, True, True))
    identity = torch.randn_like(z).requires_grad_()
    step = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    x = F.relu(waits + identity)
    with use_form('kernel'):
        codes = learned_step_quantize(x, step, 0, 15)
    tap = materialize(x)
    assert tap is x.tap and tap.data_ptr() == x.tensor().data_ptr()
    expected = F.relu(plain + identity)
    torch.testing.assert_close(tap, expected)
    with use_form('reference'):
        theirs = learned_step_quantize(expected, step, 0, 15)
    torch.testing.assert_close(codes, theirs)
    for mine, other in zip(
        torch.autograd.grad(codes.sum(), (z, step), retain_graph=True),
        torch.autograd.grad(theirs.sum(), (z, step), retain_graph=True),
        strict=True,
    ):
        close(mine, other, 'of the codes')
    for found, same in ((tap, expected), (x.tensor() + tap * 2, expected * 3)):
        upstream = torch.randn_like(z)
        for mine, other, name in zip(
            torch.autograd.grad(found, (z, identity), upstream, True),
            torch.autograd.grad(same, (z, identity), upstream, True),
            ('z', 'identity'),
            strict=True,
        ):
            close(mine, other, name)


def test_a_tap_of_what_nobody_quantized_is_the_tensor():
    waits, plain, _ = pending(Fusion(QUANTIZE, True))
    torch.testing.assert_close(materialize(waits), plain)
    assert materialize(waits) is waits.tensor()
    assert materialize(plain) is plain


@pytest.mark.parametrize('kind', [QUANTIZE, ADD])
def test_a_quantizer_of_another_kind_gets_the_tensor(kind):
    """With an offset, or a step for each channel."""
    steps = torch.rand(8, 1, 1, device=DEVICE) + 0.1
    offset = torch.tensor(0.4, device=DEVICE)
    for step, more in ((steps, {}), (steps[0, 0, 0], dict(offset=offset))):
        waits, plain, _ = pending(Fusion(kind, True, kind == ADD))
        if kind == ADD:
            waits, plain = waits + plain, plain + plain
        found = learned_step_quantize(waits, step, -8, 7, **more)
        expected = learned_step_quantize(plain, step, -8, 7, **more)
        assert ((found - expected).abs() > 1e-4).float().mean() < 0.01
        assert waits.value is not None


def test_without_gradients_nothing_is_planned_or_chained():
    net = Network(quantized).to(DEVICE).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 6, 5, device=DEVICE)
    chains = FusedBatchNorms()
    with use_form('kernel'), torch.no_grad(), chains:
        chains.plan([net(x)])
    assert chains.fusions is None


@pytest.mark.parametrize('guidance', [None, AUX, OWN])
def test_a_training_step(guidance):
    """Losses, gradients and running statistics of the joint network."""
    # so fine that a value rounded the other way does not show
    lsq = dict(type='mmauxq.LSQ', bits=8)
    settings = dict(
        NETWORK,
        guidance=guidance,
        quantizers=dict(weight=lsq, activation=lsq),
    )
    # the first one plans; all run fused, and on a GPU the third one replays
    steps = 3 if DEVICE == 'cuda' else 2
    results = []
    for form in ('reference', 'kernel'):
        model = joint_qat(**settings).to(DEVICE)
        inputs, samples = batch()
        inputs, samples = inputs.to(DEVICE), [s.to(DEVICE) for s in samples]
        with use_form(form):
            for _ in range(steps):
                model.zero_grad()
                losses = model.loss(inputs, samples)
                sum(losses.values()).backward()
        results.append((losses, model))
    (losses, plain), (found, chained) = results
    kinds = [link.kind for link in chained.step.fused_norms.fusions.values()]
    adaptors, passes = 0 if guidance is None else 3, 1 + (guidance is OWN)
    # the sums that end the first two blocks; taps do not keep them from it
    links = chained.step.fused_norms.fusions.values()
    assert sum(link.quantized for link in links) == 2 * passes
    assert kinds.count(ADD) == 3 * passes + adaptors
    assert kinds.count(QUANTIZE) == 3 * passes
    assert kinds.count(RELU) == passes
    for name, loss in losses.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-3, atol=1e-4)
    theirs = dict(chained.named_parameters())
    for name, parameter in plain.named_parameters():
        error = (theirs[name].grad - parameter.grad).norm()
        assert error < 0.02 * parameter.grad.norm() + 1e-6, name
    for ours, buffer in zip(chained.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, buffer, rtol=1e-4, atol=1e-5)


def test_planning_leaves_no_trace():
    """It is a pass of its own: statistics move once in the first step."""
    model = joint_qat(**NETWORK).to(DEVICE)
    inputs = batch()[0].to(DEVICE)
    model.calibrate(inputs)
    before = {n: b.clone() for n, b in model.named_buffers()}
    numbers = torch.get_rng_state()
    with use_form('kernel'):
        model.step._plan_fusions(inputs)
    assert model.step.fused_norms.fusions
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(p.grad is None for p in model.parameters())
    assert all(not r._outputs for r in model.all_recorders())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a CUDA GPU')
@pytest.mark.parametrize('between', [quantized, summed, residual])
def test_in_a_cuda_graph(between):
    from benchmarks.timing import graphed

    torch.manual_seed(0)
    net = Network(between).cuda().to(memory_format=torch.channels_last)
    parameters = [p for n, p in net.named_parameters()]
    x = torch.randn(4, 3, 6, 5, device='cuda')
    x = x.contiguous(memory_format=torch.channels_last)
    chains = FusedBatchNorms()
    found = []

    def step():
        with use_form('kernel'), chains:
            y = net(x)
            chains.plan([y])
        grads = torch.autograd.grad(
            y.square().sum(), parameters, allow_unused=True
        )
        return [y.detach(), *(g for g in grads if g is not None)]

    def stored():
        values = step()
        if not found:
            found.extend(torch.empty_like(v) for v in values)
        torch._foreach_copy_(found, values)

    step()
    assert len(chains.fusions) == 1
    replay = graphed(stored)
    x.normal_()
    replay()
    for ours, theirs in zip(found, step(), strict=True):
        torch.testing.assert_close(ours, theirs)
