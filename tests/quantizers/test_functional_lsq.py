"""LSQ and LSQ+ against the formulas of their papers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from mmauxq.quantizers import functional
from mmauxq.quantizers.functional import learned_step_quantize, set_backend

RANGES = [(0, 1), (0, 3), (-2, 1), (-4, 3), (0, 15), (-8, 7), (-128, 127)]
SHAPES = [(), (1,), (1, 6, 1, 1), (4, 1, 1, 1)]


def paper_value(x, step, offset, qmin, qmax):
    """LSQ eq. 1 and 2, LSQ+ eq. 1 and 2: clip first, then round."""
    codes = torch.round(torch.clamp((x - offset) / step, qmin, qmax))
    return codes * step + offset


def paper_slopes(x, step, offset, qmin, qmax):
    """Of every element, in x, step and offset.

    LSQ eq. 3 (step) and 5 (x); LSQ+ the same with the offset subtracted, and
    for the offset 1 where the value is clipped.
    """
    v = (x - offset) / step
    below, above = v <= qmin, v >= qmax
    inside = ~(below | above)
    in_step = inside * (torch.round(v) - v) + below * qmin + above * qmax
    return inside.to(x), in_step, (~inside).to(x)


def random_case(shape, qmin, qmax):
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64) * 2
    step = (torch.rand(shape, dtype=torch.float64) + 0.1) * 4 / (qmax - qmin)
    offset = torch.randn(shape, dtype=torch.float64)
    for tensor in (x, step, offset):
        tensor.requires_grad_()
    return x, step, offset


@pytest.mark.parametrize('with_offset', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('qmin, qmax', RANGES)
def test_value_is_that_of_the_paper(shape, qmin, qmax, with_offset):
    x, step, offset = random_case(shape, qmin, qmax)
    y = learned_step_quantize(
        x, step, qmin, qmax, offset if with_offset else None
    )
    zero = offset if with_offset else 0.0
    assert torch.equal(y, paper_value(x, step, zero, qmin, qmax))


@pytest.mark.parametrize('with_offset', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('qmin, qmax', RANGES)
def test_gradients_are_those_of_the_paper(shape, qmin, qmax, with_offset):
    x, step, offset = random_case(shape, qmin, qmax)
    inputs = [x, step] + [offset] * with_offset
    y = learned_step_quantize(x, step, qmin, qmax, *inputs[2:])
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, upstream)

    with torch.no_grad():
        slopes = paper_slopes(
            x, step, offset if with_offset else 0.0, qmin, qmax
        )
    for tensor, gradient, slope in zip(inputs, found, slopes, strict=False):
        expected = (upstream * slope).sum_to_size(tensor.shape)
        assert_close(gradient, expected)


# qmin = -2, qmax = 1, step = 0.5, offset = 0 or 4: all exact in binary
BORDERS = [
    # (v, code, slope in x, in step, in offset)
    (-3.0, -2, 0, -2.0, 1),
    (-2.0, -2, 0, -2.0, 1),  # v == qmin
    (-1.75, -2, 1, -0.25, 0),
    (-1.5, -2, 1, -0.5, 0),  # tie, to even
    (-0.5, 0, 1, 0.5, 0),  # tie, to even
    (0.0, 0, 1, 0.0, 0),
    (0.5, 0, 1, -0.5, 0),  # tie, to even
    (0.75, 1, 1, 0.25, 0),
    (1.0, 1, 0, 1.0, 1),  # v == qmax
    (2.0, 1, 0, 1.0, 1),
]


@pytest.mark.parametrize('shift', [None, 4.0])
@pytest.mark.parametrize('v, code, in_x, in_step, in_offset', BORDERS)
def test_borders_and_ties(v, code, in_x, in_step, in_offset, shift):
    step = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    inputs = [None, step]
    if shift is not None:
        inputs.append(torch.tensor(shift).double().requires_grad_())
    zero = shift or 0.0
    inputs[0] = torch.tensor([v * 0.5 + zero]).double().requires_grad_()
    y = learned_step_quantize(inputs[0], step, -2, 1, *inputs[2:])
    assert y.item() == code * 0.5 + zero
    found = [g.item() for g in torch.autograd.grad(y.sum(), inputs)]
    assert found == [in_x, in_step, in_offset][: len(inputs)]


@pytest.mark.parametrize('factor', [0.0, 0.25, 3.0])
def test_grad_scale_multiplies_step_and_offset_only(factor):
    x, step, offset = random_case((1, 6, 1, 1), -2, 1)

    def gradients(scale):
        y = learned_step_quantize(x, step, -2, 1, offset, scale)
        return torch.autograd.grad(y.square().sum(), (x, step, offset))

    plain, scaled = gradients(1.0), gradients(factor)
    assert torch.equal(scaled[0], plain[0])
    assert_close(scaled[1], plain[1] * factor)
    assert_close(scaled[2], plain[2] * factor)


def test_outside_the_range_the_gradient_is_the_numerical_one():
    """There the op is differentiable; inside, rounding forbids the check."""
    x = torch.tensor([-9.0, -5.0, 4.0, 7.0]).double().requires_grad_()
    step = torch.tensor(0.7).double().requires_grad_()
    offset = torch.tensor(0.3).double().requires_grad_()
    assert gradcheck(
        lambda *inputs: learned_step_quantize(
            inputs[0], inputs[1], -2, 1, inputs[2]
        ),
        (x, step, offset),
    )


def test_no_gradient_is_computed_for_what_needs_none():
    x = torch.randn(3, requires_grad=True)
    step = torch.tensor(0.5)
    learned_step_quantize(x, step, -2, 1).sum().backward()
    assert step.grad is None


@pytest.mark.parametrize(
    'dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_dtype_of_the_input_is_kept(dtype):
    x = torch.randn(8).to(dtype).requires_grad_()
    step = torch.tensor(0.3, requires_grad=True)
    y = learned_step_quantize(x, step, -2, 1)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, step.grad.dtype) == (
        dtype,
        dtype,
        torch.float32,
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_sums_the_step_gradient_in_float32(dtype):
    """10,000 ones would stop at 256 in bfloat16, at 2048 in float16."""
    x = torch.full((10_000,), 9.0, dtype=dtype)
    step = torch.tensor(1.0, requires_grad=True)
    learned_step_quantize(x, step, 0, 1).sum(dtype=torch.float32).backward()
    assert step.grad.item() == 10_000


SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
steps = st.floats(2**-10, 2**10, width=32)


def draw(seed, size=2048):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator) * 3


@SETTINGS
@given(
    seed=seeds,
    step=steps,
    offset=st.none() | st.floats(-10, 10, width=32),
    bits=st.integers(1, 8),
    signed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_never_more_levels_than_two_to_the_bits(
    seed, step, offset, bits, signed, dtype
):
    qmin = -(2 ** (bits - 1)) if signed else 0
    x = (draw(seed) * min(step, 100.0) * 2**bits).to(dtype)
    y = learned_step_quantize(
        x,
        torch.tensor(step),
        qmin,
        qmin + 2**bits - 1,
        None if offset is None else torch.tensor(offset),
    )
    assert len(y.unique()) <= 2**bits


@pytest.mark.parametrize('bits', range(1, 9))
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16]
)
def test_all_levels_are_reached(bits, dtype):
    x = (torch.arange(-1024, 1024) / 8).to(dtype)
    y = learned_step_quantize(x, torch.tensor(0.5), 0, 2**bits - 1)
    assert len(y.unique()) == 2**bits


@SETTINGS
@given(seed=seeds, step=steps, bits=st.integers(2, 8))
def test_quantizing_twice_changes_nothing(seed, step, bits):
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    step = torch.tensor(step)
    once = learned_step_quantize(draw(seed) * step, step, qmin, qmax)
    assert torch.equal(learned_step_quantize(once, step, qmin, qmax), once)


@SETTINGS
@given(seed=seeds, step=steps, power=st.integers(-20, 20))
def test_scaling_input_and_step_scales_the_output(seed, step, power):
    c, x, step = 2.0**power, draw(seed), torch.tensor(step)
    assert torch.equal(
        learned_step_quantize(c * x, c * step, -4, 3),
        c * learned_step_quantize(x, step, -4, 3),
    )


@SETTINGS
@given(seed=seeds, step=steps, bits=st.integers(1, 8))
def test_larger_values_get_no_lower_level(seed, step, bits):
    x = draw(seed).sort().values
    y = learned_step_quantize(x, torch.tensor(step), 0, 2**bits - 1)
    assert bool((y.diff() >= 0).all())


@SETTINGS
@given(seed=seeds, step=steps)
def test_inside_the_range_the_error_is_at_most_half_a_step(seed, step):
    x = draw(seed).double().clamp(-4, 3) * step
    y = learned_step_quantize(x, torch.tensor(step).double(), -4, 3)
    assert (y - x).abs().max().item() <= step / 2


def test_the_gradient_survives_compilation():
    """torch 2.11 drops that of a result which a no-op .to() gave."""
    torch._dynamo.reset()
    compiled = torch.compile(learned_step_quantize, backend='eager')
    found = []
    for op in (learned_step_quantize, compiled):
        torch.manual_seed(0)
        x = torch.randn(50, requires_grad=True)
        step = torch.tensor(0.5, requires_grad=True)
        (op(x, step, -2, 1) * torch.arange(50)).sum().backward()
        found.append((x.grad, step.grad))
    assert found[0][0].abs().sum() > 0
    assert_close(found[1], found[0])


@pytest.fixture
def backend():
    """Registers a function, and puts back what was registered before."""
    before = functional._backend
    yield set_backend
    set_backend(before)


def test_a_backend_runs_in_the_place_of_the_definition(backend):
    x, step, calls = torch.randn(5), torch.tensor(0.5), []
    result = torch.zeros(5)

    def run(*args):
        calls.append(args)
        return result

    backend(run)
    assert learned_step_quantize(x, step, -2, 1, None, 0.5) is result
    assert calls == [(x, step, -2, 1, None, 0.5)]


def test_where_a_backend_cannot_the_definition_runs(backend):
    x, step = torch.randn(5), torch.tensor(0.5)
    backend(None)
    expected = learned_step_quantize(x, step, -2, 1)
    backend(lambda *args: None)
    assert torch.equal(learned_step_quantize(x, step, -2, 1), expected)


def test_arguments_are_checked_before_a_backend_runs(backend):
    backend(lambda *args: pytest.fail('was called'))
    with pytest.raises(ValueError) as error:
        learned_step_quantize(torch.randn(5), torch.tensor(-0.5), -2, 1)
    assert str(error.value) == 'step: expected positive values, got -0.5'


def test_modes_of_torch_may_take_the_call():
    """As those of mmauxq.accelerate do, which fuse or recompute it."""
    x, step, calls = torch.randn(5), torch.tensor(0.5), []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        learned_step_quantize(x, step, -2, 1)
    assert calls[0] is learned_step_quantize


@pytest.mark.parametrize('to', [(), (1,), (4, 6), (4, 6, 5, 5), (0, 2)])
@pytest.mark.parametrize(
    'shape', [(), (1,), (6,), (4, 1), (2, 6), (1, 6, 1, 1), (0, 1), (1, 4, 6)]
)
def test_which_shapes_broadcast(shape, to):
    try:
        expected = torch.broadcast_shapes(shape, to) == torch.Size(to)
    except RuntimeError:
        expected = False
    x, step = torch.zeros(to), torch.full(shape, 0.5)
    if expected:
        assert learned_step_quantize(x, step, -2, 1).shape == x.shape
        return
    with pytest.raises(ValueError, match='step: expected a shape that broad'):
        learned_step_quantize(x, step, -2, 1)
