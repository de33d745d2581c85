"""PACT: a learned upper end of the range."""

import torch
from torch import Tensor

from .straight_through import straight_through


class _LearnedClip(torch.autograd.Function):
    """0 below 0, ``x`` in [0, alpha), ``alpha`` from there on."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return torch.minimum(x.clamp_min(0), alpha)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, alpha = ctx.saved_tensors
        above = x >= alpha
        grad_x = torch.where((x >= 0) & ~above, grad, 0)
        grad_alpha = torch.where(above, grad, 0).sum_to_size(alpha.shape)
        return grad_x, grad_alpha


def pact(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """``2**bits`` even levels of [0, alpha], with ``alpha`` learned.

    ``y = clip(x, 0, alpha)``, ``y_q = round(y n / alpha) alpha / n`` with
    ``n = 2**bits - 1``. Derivatives: in ``x`` 1 on [0, alpha), else 0; in
    ``alpha`` 1 where ``x >= alpha``, else 0.
    Computed in float32 at least, returned in the dtype of ``x``.

    Source: Choi et al., PACT, arXiv:1805.06085, eq. 1 to 3.

    Args:
        x: Any shape, floating point.
        alpha: Positive, of a shape that broadcasts to that of ``x``.
        bits: 1 to 8.

    Returns:
        The shape and dtype of ``x``.
    """
    n = 2**bits - 1
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = _LearnedClip.apply(wide, alpha)
    step = alpha.detach() / n
    return straight_through(y, (y.detach() / step).round() * step).to(x.dtype)
