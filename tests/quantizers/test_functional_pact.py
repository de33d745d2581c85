"""PACT against the formulas of its paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from mmauxq.quantizers.functional import pact

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
SHAPES = [(), (1,), (1, 6, 1, 1)]


def paper_value(x, alpha, bits):
    """Eq. 1 and 2."""
    y = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    n = 2**bits - 1
    return torch.round(y * n / alpha) * alpha / n


def random_case(shape):
    x = torch.randn(4, 6, 5, 5).double() * 2
    alpha = torch.rand(shape).double() * 2 + 0.5
    return x.requires_grad_(), alpha.requires_grad_()


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('bits', range(1, 9))
def test_value_is_that_of_the_paper(bits, shape):
    x, alpha = random_case(shape)
    assert_close(
        pact(x, alpha, bits), paper_value(x, alpha, bits), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_gradients_are_those_of_the_paper(bits, shape):
    x, alpha = random_case(shape)
    y = pact(x, alpha, bits)
    upstream = torch.randn_like(y)
    in_x, in_alpha = torch.autograd.grad(y, (x, alpha), upstream)
    # x: derivative of eq. 1, rounding as the identity; alpha: eq. 3
    passes = (x >= 0) & (x < alpha)
    expected = (upstream * (x >= alpha)).sum_to_size(alpha.shape)
    assert torch.equal(in_x, upstream * passes)
    assert_close(in_alpha, expected)


@pytest.mark.parametrize(
    'x, value, in_x, in_alpha',
    [
        (-0.25, 0.0, 0, 0),
        (0.0, 0.0, 1, 0),  # x == 0
        (0.25, 0.0, 1, 0),  # tie, to even
        (0.3125, 0.5, 1, 0),
        (0.75, 1.0, 1, 0),  # tie, to even
        (1.4375, 1.5, 1, 0),
        (1.5, 1.5, 0, 1),  # x == alpha
        (1.75, 1.5, 0, 1),
    ],
)
def test_borders_and_ties(x, value, in_x, in_alpha):
    x = torch.tensor([x]).double().requires_grad_()
    alpha = torch.tensor([1.5]).double().requires_grad_()
    y = pact(x, alpha, 2)
    assert y.item() == value
    y.backward()
    assert (x.grad.item(), alpha.grad.item()) == (in_x, in_alpha)


def test_outside_the_range_the_gradient_is_the_numerical_one():
    x = torch.tensor([-2.0, -0.5, 2.0, 5.0]).double().requires_grad_()
    alpha = torch.tensor(1.3).double().requires_grad_()
    assert gradcheck(lambda x, alpha: pact(x, alpha, 2), (x, alpha))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_input_gives_half_precision_output(dtype):
    x = torch.randn(8).to(dtype).requires_grad_()
    alpha = torch.tensor(0.3, requires_grad=True)
    y = pact(x, alpha, 2)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, alpha.grad.dtype) == (
        dtype,
        dtype,
        torch.float32,
    )


@SETTINGS
@given(
    alpha=st.floats(2**-10, 2**10, width=32),
    bits=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_never_more_levels_than_two_to_the_bits(alpha, bits, dtype):
    x = (torch.linspace(-1, 2, 4001) * alpha).to(dtype)
    assert len(pact(x, torch.tensor(alpha), bits).unique()) <= 2**bits


@pytest.mark.parametrize('bits', range(1, 9))
@pytest.mark.parametrize(
    'dtype', [torch.float32, torch.float16, torch.bfloat16]
)
def test_all_levels_are_reached(bits, dtype):
    n = 2**bits - 1
    x = torch.arange(-1, n + 2).to(dtype)
    y = pact(x, torch.tensor(float(n)), bits)
    assert y.unique().tolist() == list(range(n + 1))


@SETTINGS
@given(
    alpha=st.floats(2**-10, 2**10, width=32),
    power=st.integers(-20, 20),
    bits=st.integers(1, 8),
)
def test_scaling_input_and_alpha_scales_the_output(alpha, power, bits):
    c, x = 2.0**power, torch.linspace(-1, 2, 1001) * alpha
    alpha = torch.tensor(alpha)
    assert torch.equal(pact(c * x, c * alpha, bits), c * pact(x, alpha, bits))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('shape', SHAPES)
def test_half_precision_is_rounded_once_at_the_end(dtype, shape):
    """A scalar ``alpha`` alone would leave the arithmetic to ``dtype``."""
    x = torch.rand(4, 6, 5, 5).to(dtype) * 2
    alpha = torch.rand(shape) + 0.9
    expected = pact(x.float(), alpha, 8).to(dtype)
    assert torch.equal(pact(x, alpha, 8), expected)
