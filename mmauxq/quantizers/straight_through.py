"""The straight-through estimator, written once."""

import torch
from torch import Tensor

MIN_SCALE = 1e-6
"""Lower bound of every scale that divides."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value`` in the forward pass, the identity in ``x`` in the backward.

    The usual ``x + (value - x).detach()`` rounds: its result may differ from
    ``value`` in the last bit, so that "four levels" become more than four
    distinct floats. Here the result equals ``value`` to the bit.

    Source: Bengio et al., arXiv:1308.3432.

    Args:
        x: Any shape; receives the gradient.
        value: The shape of ``x``; receives none.

    Returns:
        The shape of ``x``.

    Example:
        >>> x = torch.tensor([0.4, 0.6], requires_grad=True)
        >>> y = straight_through(x, x.detach().round())
        >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
        ([0.0, 1.0], [1.0, 1.0])
    """
    return _StraightThrough.apply(x, value.detach())


def clamp_min_ste(scale: Tensor, minimum: float = MIN_SCALE) -> Tensor:
    """``max(scale, minimum)`` with the gradient of the identity.

    A learned scale that an update moved below ``minimum`` still works, and
    its gradient can bring it back. A plain clamp would give it none.
    """
    return straight_through(scale, scale.clamp_min(minimum))
