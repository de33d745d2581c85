"""A batch norm and what follows it, against separate operations."""

from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmauxq.accelerate.kernels.dispatch import use_form
from mmauxq.accelerate.kernels.norm import (
    batch_statistics,
    can_normalise,
    norm_add_relu_quantize,
    normalise,
    normalise_quantize,
)
from mmauxq.quantizers.functional import learned_step_quantize

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Triton's interpreter rounds to bfloat16 by cutting off
HALF = torch.float16 if DEVICE == 'cpu' else torch.bfloat16
SCALE = 0.37
# channels that divide nothing, a single row of tiles, more rows than a tile
SHAPES = [(3, 3, 5, 7), (2, 130, 3, 3), (5, 8, 21, 20), (2, 1, 1, 1)]


@pytest.fixture(autouse=True)
def kernel(poisoned):
    with use_form('kernel'):
        yield


def feature_map(shape, dtype=torch.float32, spread=2.0, shift=5.0):
    z = torch.randn(shape) * spread + torch.randn(1, shape[1], 1, 1) * shift
    z = z.to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    return z.requires_grad_()


def norm_of(channels):
    weight = (torch.rand(channels, device=DEVICE) + 0.5).requires_grad_()
    bias = torch.randn(channels, device=DEVICE).requires_grad_()
    running = [torch.randn(channels), torch.rand(channels) + 1]
    return weight, bias, [r.to(DEVICE) for r in running]


def separate(z, weight, bias, running, identity, bound, step, qmin):
    x = F.batch_norm(z, *running, weight, bias, True, 0.1, 1e-5)
    x = x if identity is None else x + identity
    x = x if bound is None else F.hardtanh(x, 0.0, bound)
    if step is None:
        return x
    with use_form('reference'):
        q = learned_step_quantize(x, step, qmin, 15, grad_scale=SCALE)
    return q if identity is None else (x, x * 1, q)


def fused(z, weight, bias, running, identity, bound, step, qmin):
    norm = batch_statistics(z.detach(), weight, bias, *running, 0.1, 1e-5)
    if step is None:
        return normalise(z, norm, identity, bound)
    how = (bound, step, qmin, 15, SCALE)
    if identity is None:
        return normalise_quantize(z, norm, *how)
    return norm_add_relu_quantize(z, norm, identity, *how)


@pytest.mark.parametrize('bound', [None, inf, 1.2])
@pytest.mark.parametrize('kind', ['alone', 'add', 'quantize', 'both'])
@pytest.mark.parametrize('shape', SHAPES)
def test_equals_separate_operations(shape, kind, bound):
    z = feature_map(shape)
    weight, bias, running = norm_of(shape[1])
    identity = feature_map(shape) if kind in ('add', 'both') else None
    step = None
    if kind in ('quantize', 'both'):
        step = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    inputs = [t for t in (z, weight, bias, identity, step) if t is not None]
    upstream = torch.randn(3, *shape, device=DEVICE)
    results = []
    for run in (separate, fused):
        copies = [r.clone() for r in running]
        y = run(z, weight, bias, copies, identity, bound, step, -8)
        y = y if kind == 'both' else (y,)
        grads = torch.autograd.grad(y, inputs, list(upstream[: len(y)]))
        results.append([*y, *grads, *copies])
    expected, found = results
    assert found[0].stride() == z.stride()
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(theirs.detach().abs().max().item(), 1.0)
        assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.parametrize('kind', ['quantize', 'both'])
def test_sums_of_more_parts_than_a_program_reads_at_once(kind, monkeypatch):
    for name in ('STATISTICS_TILE', 'REDUCE_TILE', 'SUM_TILE'):
        monkeypatch.setattr(f'mmauxq.accelerate.kernels.norm.{name}', (8, 4))
    monkeypatch.setattr(
        'mmauxq.accelerate.kernels.tiles.multiprocessors', lambda device: 3
    )
    test_equals_separate_operations((5, 8, 7, 5), kind, inf)


@pytest.mark.parametrize('read', [[0], [1], [2], [0, 2], [1, 2]])
def test_both_when_not_all_are_read(read):
    shape = (3, 6, 5, 7)
    z, identity = feature_map(shape), feature_map(shape)
    weight, bias, running = norm_of(6)
    step = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    inputs = [z, weight, bias, identity]
    upstream = list(torch.randn(len(read), *shape, device=DEVICE))
    results = []
    for run in (separate, fused):
        y = run(z, weight, bias, running, identity, inf, step, 0)
        y = [y[i] for i in read]
        results.append(torch.autograd.grad(y, inputs, upstream))
    for ours, theirs in zip(*results[::-1], strict=True):
        scale = max(theirs.abs().max().item(), 1.0)
        assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * scale)


def test_both_in_half_precision_are_the_two_operations():
    """The gradients of sum and codes are added as autograd adds them."""
    z, identity = (feature_map((4, 16, 9, 9), HALF) for _ in 'zi')
    weight, bias, running = norm_of(16)
    step = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    inputs = [z, weight, bias, identity, step]
    upstream = [torch.randn_like(z) for _ in 'xxq']
    norm = batch_statistics(z.detach(), weight, bias, *running, 0.1, 1e-5)
    both = norm_add_relu_quantize(z, norm, identity, inf, step, 0, 15, SCALE)
    x = normalise(z, norm, identity, inf)
    q = learned_step_quantize(x, step, 0, 15, grad_scale=SCALE)
    found = torch.autograd.grad(both, inputs, upstream)
    added = [upstream[0] + upstream[1], upstream[2]]
    expected = torch.autograd.grad((x, q), inputs, added)
    assert torch.equal(both[0], x) and torch.equal(both[2], q)
    assert both[1].data_ptr() == both[0].data_ptr()
    for ours, theirs in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(ours, theirs)
    assert_close(found[4], expected[4])


def test_rounds_where_separate_operations_round():
    """After the norm, after the sum."""
    z = feature_map((4, 16, 9, 9), HALF)
    identity = feature_map((4, 16, 9, 9), HALF)
    weight, bias, running = norm_of(16)
    with torch.no_grad():
        found = fused(z, weight, bias, running, identity, inf, None, 0)
        wide = F.batch_norm(
            z.float(), None, None, weight, bias, True, 0.1, 1e-5
        )
        expected = F.relu(wide.to(HALF) + identity)
        at_once = F.relu(wide + identity.float()).to(HALF)
    assert (found != expected).float().mean() < 0.002
    assert (at_once != expected).float().mean() > 0.05


def test_gradients_in_half_precision_against_float64():
    z = feature_map((4, 16, 9, 9), HALF)
    weight, bias, running = norm_of(16)
    step = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    upstream = torch.randn_like(z)
    y = fused(z, weight, bias, running, None, inf, step, 0)
    found = torch.autograd.grad(y, (z, weight, bias, step), upstream)
    # with the codes of float32 arithmetic, sums in float64
    with torch.no_grad():
        wide = z.double()
        mean = wide.mean((0, 2, 3), keepdim=True)
        rstd = (wide.var((0, 2, 3), keepdim=True, correction=0) + 1e-5) ** -0.5
        hat = (wide - mean) * rstd
        w, b = (p.double().reshape(1, -1, 1, 1) for p in (weight, bias))
        x = F.relu((hat * w + b).to(HALF)).float()
        v = x / step
        inside = (v > 0) & (v < 15) & (x > 0)
        slope = torch.where(inside, v.round() - v, v.clamp(0, 15)).double()
        g = torch.where(inside, upstream, 0).double()
        sums = [(g * hat).sum((0, 2, 3)), g.sum((0, 2, 3))]
        n = z.numel() // 16
        centred = g - (sums[1].reshape_as(w) + hat * sums[0].reshape_as(w)) / n
        parts = slope * upstream.double() * SCALE
    assert_close(found[0].double(), w * rstd * centred, rtol=1e-2, atol=1e-2)
    # sums of n products, to a part of the sum of their sizes
    for ours, theirs, size in (
        (found[1], sums[0], (g * hat).abs().sum((0, 2, 3))),
        (found[2], sums[1], g.abs().sum((0, 2, 3))),
        (found[3], parts.sum(), parts.abs().sum()),
    ):
        assert ((ours.double() - theirs).abs() <= 1e-3 * size).all()


def test_variance_far_from_zero():
    """A mean of 1,000 deviations does not swallow the variance."""
    z = feature_map((8, 4, 16, 16), spread=1.0, shift=1000.0)
    weight, bias, running = norm_of(4)
    norm = batch_statistics(z.detach(), weight, bias, *running, 0.1, 0.0)
    wide = z.detach().double()
    assert_close(norm.mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    expected = wide.var((0, 2, 3), correction=0) ** -0.5
    assert_close(norm.rstd.double(), expected, rtol=1e-4, atol=0)


def test_repeats_to_the_bit():
    # the interpreter runs one program after the other, and takes its time
    z = feature_map((5, 24, *((33, 31) if DEVICE == 'cuda' else (11, 9))))
    weight, bias, running = norm_of(24)
    step = torch.tensor(0.3, device=DEVICE, requires_grad=True)

    def run():
        y = fused(z, weight, bias, running, None, inf, step, 0)
        return [y, *torch.autograd.grad(y, (z, weight, bias, step), y)]

    assert all(torch.equal(*pair) for pair in zip(run(), run(), strict=True))


def test_nan_is_not_hidden():
    z = feature_map((2, 4, 3, 3))
    weight, bias, running = norm_of(4)
    with torch.no_grad():
        z[0, 1, 0, 0] = torch.nan
        for step in (None, torch.tensor(0.3, device=DEVICE)):
            y = fused(z, weight, bias, running, None, inf, step, 0)
            assert y[:, 1].isnan().all()
            assert y[:, [0, 2, 3]].isfinite().all()


class Looking(torch.Tensor):
    """Notes what it is given to."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append((func, args))
        return super().__torch_function__(func, types, args, kwargs)


def test_the_ops_are_seen_whole_by_subclasses_of_tensors():
    z = feature_map((2, 4, 3, 3)).detach()
    weight, bias, running = norm_of(4)
    norm = batch_statistics(z, weight, bias, *running, 0.1, 1e-5)
    step = torch.tensor(0.3, device=DEVICE)
    for op, args in (
        (normalise, (norm, z, inf)),
        (normalise_quantize, (norm, inf, step, 0, 15, SCALE)),
        (norm_add_relu_quantize, (norm, z, inf, step, 0, 15, SCALE)),
    ):
        Looking.seen.clear()
        looking = z.as_subclass(Looking)
        found = op(looking, *args)
        func, seen = Looking.seen[0]
        assert func is op and seen[0] is looking
        assert all(a is b for a, b in zip(seen[1:], args, strict=True))
        expected = op(z, *args)
        if op is not norm_add_relu_quantize:
            found, expected = (found,), (expected,)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.as_subclass(torch.Tensor), theirs)


def test_what_can_be_taken():
    z = feature_map((2, 4, 3, 3)).detach()
    weight, bias, _ = norm_of(4)
    assert can_normalise(z, weight, bias)
    assert can_normalise(z.bfloat16(), weight, bias)
    assert not can_normalise(z.contiguous(), weight, bias)
    assert not can_normalise(z.double(), weight, bias)
    assert not can_normalise(z[0], weight, bias)
    assert not can_normalise(z[:, :2], weight, bias)
    assert not can_normalise(z, None, None)
    assert not can_normalise(z[:0], weight, bias)
    assert not can_normalise(z[:1, :, :1, :1], weight, bias)  # one row
    with use_form('reference'):
        assert not can_normalise(z, weight, bias)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a CUDA GPU')
@pytest.mark.parametrize('kind', ['add', 'quantize', 'both'])
def test_on_a_gpu_at_real_sizes(kind):
    shape = (64, 256, 56, 56)
    z = feature_map(shape, torch.bfloat16)
    identity = None
    if kind in ('add', 'both'):
        identity = feature_map(shape, torch.bfloat16)
    weight, bias, running = norm_of(256)
    step = None
    if kind in ('quantize', 'both'):
        step = torch.tensor(0.3, device=DEVICE, requires_grad=True)
    inputs = [t for t in (z, weight, bias, step) if t is not None]
    upstream = torch.randn_like(z)
    results = []
    for run in (separate, fused):
        y = run(z, weight, bias, running, identity, inf, step, 0)
        y = y if kind == 'both' else (y,)
        grads = torch.autograd.grad(y, inputs, [upstream] * len(y))
        results.append([y[-1].detach(), *grads])
    expected, found = results
    # a rounding to bfloat16 may fall the other way, and move a code
    moved = (found[0] - expected[0]).abs() > 0.05 * expected[0].abs() + 1e-3
    assert moved.float().mean() < 2e-3
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        error = (ours - theirs).float().norm() / theirs.float().norm()
        assert error < 0.02
