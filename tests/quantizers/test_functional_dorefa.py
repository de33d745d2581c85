"""DoReFa-Net against the formulas of its paper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close

from mmauxq.quantizers.functional import dorefa_activation, dorefa_weight

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def quantize_k(r, bits):
    """Eq. 5, for r in [0, 1]."""
    n = 2**bits - 1
    return torch.round(n * r) / n


def grad_of(y, x, upstream):
    return torch.autograd.grad(y, x, upstream)[0]


@pytest.mark.parametrize('bits', range(1, 9))
def test_activation_value_is_that_of_the_paper(bits):
    x = torch.randn(1000).double()
    expected = quantize_k(x.clamp(0, 1), bits)  # eq. 11
    assert torch.equal(dorefa_activation(x, bits), expected)


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_activation_gradient_is_that_of_the_paper(bits):
    x = torch.randn(1000).double().requires_grad_()
    upstream = torch.randn(1000).double()
    found = grad_of(dorefa_activation(x, bits), x, upstream)
    assert torch.equal(found, upstream * ((x > 0) & (x < 1)))


@pytest.mark.parametrize(
    'x, value, slope',
    [
        (-0.5, 0.0, 0),
        (0.0, 0.0, 0),  # lower border
        (2**-40, 0.0, 1),
        (0.5, 2 / 3, 1),  # tie, 1.5 to the even 2
        (1 - 2**-40, 1.0, 1),
        (1.0, 1.0, 0),  # upper border
        (1.5, 1.0, 0),
    ],
)
def test_activation_borders(x, value, slope):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = dorefa_activation(x, 2)
    y.backward()
    assert (y.item(), x.grad.item()) == (value, slope)


@pytest.mark.parametrize('bits', range(1, 9))
@pytest.mark.parametrize('dtype', DTYPES)
def test_activation_has_two_to_the_bits_levels(bits, dtype):
    y = dorefa_activation(torch.linspace(-1, 2, 4001).to(dtype), bits)
    assert len(y.unique()) == 2**bits


@SETTINGS
@given(x=st.floats(-2, 3, width=32), bits=st.integers(1, 8))
def test_quantizing_an_activation_twice_changes_nothing(x, bits):
    once = dorefa_activation(torch.tensor(x), bits)
    assert torch.equal(dorefa_activation(once, bits), once)


def paper_weight(w, bits):
    """Eq. 8 for one bit, eq. 9 for more."""
    if bits == 1:
        return w.sign() * w.abs().mean()
    t = torch.tanh(w)
    return 2 * quantize_k(t / (2 * t.abs().max()) + 0.5, bits) - 1


@pytest.mark.parametrize('bits', range(1, 9))
def test_weight_value_is_that_of_the_paper(bits):
    w = torch.randn(8, 3, 3, 3).double()
    assert torch.equal(dorefa_weight(w, bits), paper_weight(w, bits))


@pytest.mark.parametrize('bits', range(2, 9))
def test_weight_gradient_is_that_of_the_paper(bits):
    """Rounding as the identity, and the maximum as a constant."""
    w = torch.randn(8, 3, 3, 3).double().requires_grad_()
    upstream = torch.randn(8, 3, 3, 3).double()
    found = grad_of(dorefa_weight(w, bits), w, upstream)
    t = torch.tanh(w.detach())
    assert_close(found, upstream * (1 - t**2) / t.abs().max())


def test_weight_gradient_is_the_numerical_one_of_the_unrounded_formula():
    w = torch.randn(20).double().requires_grad_()
    limit = w.detach().tanh().abs().max()
    unrounded = lambda w: 2 * (w.tanh() / (2 * limit) + 0.5) - 1  # noqa: E731
    assert gradcheck(unrounded, (w,))
    ones = torch.ones_like(w)
    assert_close(
        grad_of(dorefa_weight(w, 4), w, ones), grad_of(unrounded(w), w, ones)
    )


def test_one_bit_weight_gradient_is_the_identity():
    w = torch.randn(20).double().requires_grad_()
    upstream = torch.randn(20).double()
    assert torch.equal(grad_of(dorefa_weight(w, 1), w, upstream), upstream)


def test_one_bit_weight_of_zero_takes_the_upper_level():
    w = torch.tensor([-1.0, 0.0, 2.0])
    assert dorefa_weight(w, 1).tolist() == [-1.0, 1.0, 1.0]


def test_largest_weights_reach_the_ends_of_the_range():
    w = torch.tensor([-3.0, 0.5, 3.0])
    assert dorefa_weight(w, 2)[[0, 2]].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize('bits', [1, 2, 8])
def test_all_zero_weights_stay_finite(bits):
    w = torch.zeros(4, requires_grad=True)
    y = dorefa_weight(w, bits)
    assert bool(y.isfinite().all())


@pytest.mark.parametrize('bits', range(1, 9))
@pytest.mark.parametrize('dtype', DTYPES)
def test_weight_has_two_to_the_bits_levels(bits, dtype):
    w = torch.linspace(-1, 1, 4001).to(dtype)
    assert len(dorefa_weight(w, bits).unique()) == 2**bits


@SETTINGS
@given(
    seed=st.integers(0, 2**31),
    spread=st.floats(1e-4, 1e2),
    bits=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
)
def test_weight_never_has_more_levels(seed, spread, bits, dtype):
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(2048, generator=generator) * spread).to(dtype)
    assert len(dorefa_weight(w, bits).unique()) <= 2**bits


@pytest.mark.parametrize('op', [dorefa_activation, dorefa_weight])
@pytest.mark.parametrize('dtype', [*DTYPES, torch.float64])
def test_dtype_is_kept(op, dtype):
    x = torch.randn(8).to(dtype).requires_grad_()
    y = op(x, 2)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('bits', [1, 2, 8])
@pytest.mark.parametrize('op', [dorefa_activation, dorefa_weight])
def test_half_precision_is_rounded_once_at_the_end(op, bits, dtype):
    x = torch.randn(4, 500).to(dtype)
    expected = op(x.float(), bits).to(dtype)
    found = op(x, bits)
    assert found.dtype == dtype and torch.equal(found, expected)
