"""LSQ and LSQ+: a learned step, and a learned offset."""

import torch
from torch import Tensor


class _LearnedStepQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        step: Tensor,
        offset: Tensor | None,
        qmin: int,
        qmax: int,
        grad_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, step, offset)
        ctx.range = (qmin, qmax, grad_scale)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if offset is not None:
            wide = wide - offset
        code = (wide / step).round().clamp(qmin, qmax)
        value = code * step
        if offset is not None:
            value = value + offset
        # under torch.compile (2.11), a result that comes of a .to() without
        # effect gets no gradient, and nothing says so
        return value if value.dtype == x.dtype else value.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, step, offset = ctx.saved_tensors
        qmin, qmax, grad_scale = ctx.range
        wide_grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
        wide = x.to(wide_grad.dtype)
        if offset is not None:
            wide = wide - offset
        v = wide / step
        inside = (v > qmin) & (v < qmax)
        grad_x = torch.where(inside, grad, 0)
        grad_step = grad_offset = None
        if ctx.needs_input_grad[1]:
            slope = torch.where(inside, v.round() - v, v.clamp(qmin, qmax))
            grad_step = (wide_grad * slope).sum_to_size(
                step.shape
            ) * grad_scale
        if offset is not None and ctx.needs_input_grad[2]:
            grad_offset = (
                torch.where(inside, 0, wide_grad).sum_to_size(offset.shape)
                * grad_scale
            )
        return grad_x, grad_step, grad_offset, None, None, None


def learned_step_quantize(
    x: Tensor,
    step: Tensor,
    qmin: int,
    qmax: int,
    offset: Tensor | None = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """``clip(round((x - offset) / step), qmin, qmax) * step + offset``.

    With ``v = (x - offset) / step`` the derivatives are::

                    qmin < v < qmax      v <= qmin    v >= qmax
        in x        1                    0            0
        in step     round(v) - v         qmin         qmax
        in offset   0                    1            1

    and those of ``step`` and ``offset`` are multiplied by ``grad_scale``.
    Computed in float32 at least, returned in the dtype of ``x``; rounding is
    to nearest, ties to even, as in ONNX ``QuantizeLinear``.

    Sources: Esser et al., Learned Step Size Quantization, arXiv:1902.08153,
    eq. 1 to 5; Bhalgat et al., LSQ+, arXiv:2004.09576, eq. 1 to 6.

    Args:
        x: Any shape, floating point.
        step: Positive, of a shape that broadcasts to that of ``x``.
        qmin: Lowest code, at most 0.
        qmax: Highest code, above ``qmin``.
        offset: As ``step``; ``None`` for 0.
        grad_scale: Factor on the gradients of ``step`` and ``offset``; LSQ
            has ``1 / sqrt(number of values * qmax)``.

    Returns:
        The shape and dtype of ``x``, with at most ``qmax - qmin + 1``
        distinct values for each element of ``step``.
    """
    return _LearnedStepQuantize.apply(x, step, offset, qmin, qmax, grad_scale)
