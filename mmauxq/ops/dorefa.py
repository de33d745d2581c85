"""DoReFa-Net: fixed ranges, straight-through rounding."""

import torch
from torch import Tensor

from .straight_through import straight_through


def _quantize_unit(x: Tensor, bits: int) -> Tensor:
    """``round(x n) / n`` with ``n = 2**bits - 1``, for ``x`` in [0, 1]."""
    n = 2**bits - 1
    return straight_through(x, (x * n).round() / n)


class _ClipUnit(torch.autograd.Function):
    """min(max(x, 0), 1); the derivative is 0 on the borders.

    ``torch.clamp`` has derivative 1 there. The paper leaves it open; 0 is what
    the other quantizers of this package have at the end of their range.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return torch.where((x > 0) & (x < 1), grad, 0)


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """``2**bits`` even levels of [0, 1]: ``quantize_k(clip(x, 0, 1))``.

    The gradient is that of the clip: 1 strictly inside (0, 1), else 0.
    Computed in float32 at least, returned in the dtype of ``x``.

    Source: Zhou et al., DoReFa-Net, arXiv:1606.06160, eq. 5 and 11.

    Args:
        x: Any shape, floating point.
        bits: 1 to 8.

    Returns:
        The shape and dtype of ``x``.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return _quantize_unit(_ClipUnit.apply(wide), bits).to(x.dtype)


def dorefa_weight(w: Tensor, bits: int) -> Tensor:
    """``2**bits`` even levels of [-1, 1].

    ``2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1``, whose derivative is
    ``(1 - tanh(w)**2) / max|tanh(w)|`` (the maximum counts as a constant, the
    rounding as the identity). With one bit the levels are
    ``+-mean|w|`` and the derivative is 1.

    Source: Zhou et al., DoReFa-Net, arXiv:1606.06160, eq. 8 and 9.

    Args:
        w: Any shape, floating point, not all zero.
        bits: 1 to 8.

    Returns:
        The shape and dtype of ``w``.
    """
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    if bits == 1:
        # sign(0) would be a third level
        sign = torch.where(wide < 0, -1.0, 1.0).to(wide.dtype)
        return straight_through(wide, sign * wide.abs().mean()).to(w.dtype)
    squashed = wide.tanh()
    limit = (
        squashed.detach().abs().max().clamp_min(torch.finfo(wide.dtype).tiny)
    )
    unit = _quantize_unit(squashed / (2 * limit) + 0.5, bits)
    return (2 * unit - 1).to(w.dtype)
