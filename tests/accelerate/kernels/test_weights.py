"""All weights in one launch against one op for each."""

import pytest
import torch
from torch.testing import assert_close

from mmauxq.accelerate.kernels.dispatch import keep_alive, use_form
from mmauxq.accelerate.kernels.weights import (
    GroupedQuantizer,
    WeightRange,
    can_group,
)
from mmauxq.quantizers.functional import clamp_min_ste, learned_step_quantize

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# shape, one step per channel, channels-last: rows longer than a block, rows
# of one element, one row
WEIGHTS = [
    ((5, 3, 3, 3), False, True),
    ((4, 130, 3, 3), True, True),
    ((7, 2, 1, 1), True, False),
    ((1, 1, 3, 3), True, False),
    ((6, 1, 3, 3), False, False),
    ((9, 40), True, False),
    ((3, 2, 5), False, False),
    ((2, 6), True, False),
]
RANGES = [
    WeightRange(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.1 * bits)
    for bits in (4, 2, 8, 3, 4, 4, 2, 4)
]


def network():
    weights, steps = [], []
    for shape, per_channel, channels_last in WEIGHTS:
        w = torch.randn(shape).to(DEVICE)
        if channels_last:
            w = w.contiguous(memory_format=torch.channels_last)
        s = torch.rand(shape[0] if per_channel else 1).to(DEVICE) + 0.2
        weights.append(w.requires_grad_())
        steps.append(s.requires_grad_())
    steps[1].data[1] = -0.3  # thrown there by an update
    return weights, steps


def one_by_one(weights, steps, dtype):
    with use_form('reference'):
        return [
            learned_step_quantize(
                w,
                clamp_min_ste(s).reshape(-1, *[1] * (w.dim() - 1)),
                r.qmin,
                r.qmax,
                grad_scale=r.grad_scale,
            ).to(dtype)
            for w, s, r in zip(weights, steps, RANGES, strict=True)
        ]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_equals_one_op_for_each(dtype, poisoned):
    weights, steps = network()
    together = GroupedQuantizer(RANGES)
    found = together(weights, steps, dtype)
    expected = one_by_one(weights, steps, dtype)
    upstream = [torch.randn_like(y) for y in expected]
    inputs = [*weights, *steps]
    grads = torch.autograd.grad(found, inputs, upstream)
    expected_grads = torch.autograd.grad(expected, inputs, upstream)
    for ours, theirs, w in zip(found, expected, weights, strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.stride(), ours.dtype) == (w.stride(), dtype)
    half = len(weights)
    for ours, theirs in zip(grads[:half], expected_grads[:half], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(grads[half:], expected_grads[half:], strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_new_values_and_new_places_are_seen():
    weights, steps = network()
    together = GroupedQuantizer(RANGES)
    together(weights, steps)
    with torch.no_grad():
        weights[2].mul_(0.5)  # the same memory
        weights[4] = weights[4].detach().clone() + 1  # another
    for ours, theirs in zip(
        together(weights, steps),
        one_by_one(weights, steps, torch.float32),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_tables_are_made_once_for_the_same_places():
    weights, steps = network()
    together = GroupedQuantizer(RANGES)
    together(weights, steps)
    table = together.table
    together(weights, steps)
    assert together.table is table


def test_one_weight_alone():
    w = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    s = torch.full((1,), 0.3, device=DEVICE, requires_grad=True)
    (found,) = GroupedQuantizer(RANGES[:1])([w], [s])
    r = RANGES[0]
    with use_form('reference'):
        expected = learned_step_quantize(
            w, s, r.qmin, r.qmax, grad_scale=r.grad_scale
        )
    assert torch.equal(found, expected)
    upstream = torch.randn_like(w)
    ours = torch.autograd.grad(found, (w, s), upstream)
    theirs = torch.autograd.grad(expected, (w, s), upstream)
    assert torch.equal(ours[0], theirs[0])
    assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)


def test_results_begin_at_aligned_places():
    weights, steps = network()
    for y in GroupedQuantizer(RANGES)(weights, steps, torch.bfloat16):
        assert y.storage_offset() % 64 == 0


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_results_that_nobody_used_and_gradients_of_other_layouts(dtype):
    weights, steps = network()
    found = GroupedQuantizer(RANGES)(weights, steps, dtype)
    upstream = torch.randn(4, 3, 3, 130, device=DEVICE, dtype=dtype)
    upstream = upstream.permute(0, 3, 1, 2)
    found[1].backward(upstream.contiguous())
    assert weights[0].grad is None and steps[0].grad is None
    expected = one_by_one(weights, steps, dtype)[1]
    (grad,) = torch.autograd.grad(expected, weights[1], upstream)
    assert torch.equal(weights[1].grad, grad)


def test_gradients_of_one_layout_beside_gradients_of_another():
    weights, steps = network()
    found = GroupedQuantizer(RANGES)(weights, steps, torch.float16)[:2]
    expected = one_by_one(weights, steps, torch.float16)[:2]
    upstream = [torch.randn_like(y) for y in found]
    other = [upstream[0], upstream[1].contiguous()]
    ours = torch.autograd.grad(found, weights[:2], other)
    theirs = torch.autograd.grad(expected, weights[:2], upstream)
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, their)


def test_what_can_be_taken():
    step = torch.ones(1, device=DEVICE)
    w = torch.randn(4, 6, device=DEVICE)
    assert can_group(w, step)
    assert can_group(w, torch.ones(4, device=DEVICE))
    assert not can_group(w, torch.ones(6, device=DEVICE))
    assert not can_group(w.t(), step)
    assert not can_group(w[:, :3], step)
    assert not can_group(w.bfloat16(), step)
    assert not can_group(w[:0], step)
    assert can_group(w[:1, :1], step)
    assert not can_group(w[0, 0], step)
    row = torch.empty_strided((1, 6), (100, 1), device=DEVICE)
    assert can_group(row, step)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == 'cpu', reason='needs a CUDA GPU')
def test_in_a_cuda_graph():
    from benchmarks.timing import graphed

    weights, steps = network()
    together = GroupedQuantizer(RANGES)
    upstream = [torch.randn_like(w) for w in weights]
    found = [torch.empty_like(t) for t in (*weights, *steps)]

    def step():
        y = together(weights, steps)
        grads = torch.autograd.grad(y, [*weights, *steps], upstream)
        torch._foreach_copy_(found, grads)

    with keep_alive() as kept:
        replay = graphed(step)
    with torch.no_grad():
        for tensor in (*weights, *upstream):
            tensor.normal_()
    replay()
    assert kept  # as long as it is replayed
    expected = torch.autograd.grad(
        one_by_one(weights, steps, torch.float32),
        [*weights, *steps],
        upstream,
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
