import pytest
import torch

from mmauxq.quantizers.functional import clamp_min_ste, straight_through


def grad_of(y, x):
    return torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_value_is_kept_to_the_bit(dtype):
    x = torch.randn(10_000, dtype=dtype, requires_grad=True)
    value = torch.randn(10_000, dtype=dtype) * 1e-3
    value[0] = -0.0
    as_int = torch.int32 if dtype == torch.float32 else torch.int64
    y = straight_through(x, value)
    assert torch.equal(y.view(as_int), value.view(as_int))


def test_the_usual_detach_idiom_would_not_keep_it():
    """Why the op exists; if this fails, it could be a plain expression."""
    x = torch.randn(10_000)
    value = torch.randn(10_000) * 1e-3
    assert not torch.equal(x + (value - x).detach(), value)


def test_the_gradient_is_the_identity():
    x = torch.randn(5, requires_grad=True)
    weight = torch.randn(5)
    y = straight_through(x, x.detach().round())
    assert torch.equal(grad_of(y * weight, x), weight)


def test_the_value_receives_no_gradient():
    x = torch.randn(5, requires_grad=True)
    value = torch.randn(5, requires_grad=True)
    straight_through(x, value).sum().backward()
    assert value.grad is None


def test_lower_bound_lifts_only_what_is_below():
    scale = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    assert clamp_min_ste(scale, 0.5).tolist() == [0.5, 0.5, 0.5, 2.0]


def test_lower_bound_lets_the_gradient_through():
    scale = torch.tensor([-1.0, 0.0, 0.5, 2.0], requires_grad=True)
    assert grad_of(clamp_min_ste(scale, 0.5), scale).tolist() == [1.0] * 4
