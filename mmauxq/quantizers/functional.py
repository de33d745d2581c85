"""The arithmetic of the quantizers: tensors in, tensors out, torch alone.

This is the definition: the kernels of :mod:`mmauxq.accelerate` must agree with
it in value and gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

MIN_SCALE = 1e-6
"""Lower bound of every scale that divides."""

_backend: Callable[..., Tensor | None] | None = None


def set_backend(backend: Callable[..., Tensor | None] | None) -> None:
    """Register a faster :func:`learned_step_quantize`, or none; it returns
    ``None`` for arguments that it cannot run."""
    global _backend
    _backend = backend


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value`` in the forward pass, the identity in ``x`` in the backward.

    The result equals ``value``, of the shape of ``x``, to the bit. The usual
    ``x + (value - x).detach()`` rounds, so that "four levels" become more than
    four distinct floats. Source: Bengio et al., arXiv:1308.3432.

    Example:
        >>> x = torch.tensor([0.4, 0.6], requires_grad=True)
        >>> y = straight_through(x, x.detach().round())
        >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
        ([0.0, 1.0], [1.0, 1.0])
    """
    return _StraightThrough.apply(x, value.detach())


def clamp_min_ste(scale: Tensor, minimum: float = MIN_SCALE) -> Tensor:
    """``max(scale, minimum)`` with the gradient of the identity, which can
    bring a learned scale back from below ``minimum``."""
    return straight_through(scale, scale.clamp_min(minimum))


# --- LSQ and LSQ+ -----------------------------------------------------------


def lsq_forward(
    x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    """The value of :func:`learned_step_quantize`, without a gradient."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if offset is not None:
        wide = wide - offset
    code = (wide / step).round().clamp(qmin, qmax)
    value = code * step
    if offset is not None:
        value = value + offset
    # Under torch.compile (2.11), a result that comes from a .to() without
    # effect silently gets no gradient.
    return value if value.dtype == x.dtype else value.to(x.dtype)


def lsq_backward(
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of :func:`learned_step_quantize` in ``x``, ``step`` and
    ``offset``."""
    wide_grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    wide = x.to(wide_grad.dtype)
    if offset is not None:
        wide = wide - offset
    # Equal to wide / step to the bit. Written in this way because a compiler
    # would keep the quotient of the forward pass in memory, in float32.
    v = -(wide / -step)
    inside = (v > qmin) & (v < qmax)
    grad_x = torch.where(inside, grad, 0)
    slope = torch.where(inside, v.round() - v, v.clamp(qmin, qmax))
    grad_step = _sum_to(wide_grad * slope, step.shape) * grad_scale
    grad_offset = None
    if offset is not None:
        outside = torch.where(inside, 0, wide_grad)
        grad_offset = _sum_to(outside, offset.shape) * grad_scale
    return grad_x, grad_step, grad_offset


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    """The sum of ``x`` over the axes along which ``shape`` does not vary."""
    # Everything is summed by channels first, as in the backward pass of batch
    # norm, so that a compiler reads the tensor once for both.
    if shape.numel() == 1 and x.dim() > 2:
        channel = 1 if x.dim() > 3 else x.dim() - 1
        x = x.sum([i for i in range(x.dim()) if i != channel])
        return x.sum().reshape(shape)
    return x.sum_to_size(shape)


class LearnedStepFunction(torch.autograd.Function):
    """Any pair of functions with the signatures of :func:`lsq_forward` and
    :func:`lsq_backward` as one differentiable function."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        step: Tensor,
        offset: Tensor | None,
        qmin: int,
        qmax: int,
        grad_scale: float,
        forward: Callable,
        backward: Callable,
    ) -> Tensor:
        ctx.save_for_backward(x, step, offset)
        ctx.range = (qmin, qmax, grad_scale)
        ctx.run_backward = backward
        return forward(x, step, offset, qmin, qmax)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grads = ctx.run_backward(grad, *ctx.saved_tensors, *ctx.range)
        return *grads, None, None, None, None, None


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
        step: Positive, of a shape that broadcasts to that of ``x``. The sign
            is checked on the CPU alone: a GPU would stall at every call.
        qmin: Lowest code, at most 0.
        qmax: Highest code, above ``qmin``.
        offset: Of the shape of ``step``; ``None`` for 0.
        grad_scale: LSQ uses ``1 / sqrt(number of values * qmax)``.

    Raises:
        TypeError: If ``x``, ``step`` or ``offset`` is not floating point.
        ValueError: If a shape, a device, the range or a sign does not fit.
    """
    # Overridable like any function of torch: the modes of mmauxq.accelerate
    # fuse it with its neighbours or recompute it.
    if has_torch_function_unary(x):
        options = dict(offset=offset, grad_scale=grad_scale)
        return handle_torch_function(
            learned_step_quantize, (x,), x, step, qmin, qmax, **options
        )
    _check(x, step, offset, qmin, qmax)
    if _backend is not None:
        result = _backend(x, step, qmin, qmax, offset, grad_scale)
        if result is not None:
            return result
    return LearnedStepFunction.apply(
        x, step, offset, qmin, qmax, grad_scale, lsq_forward, lsq_backward
    )


def _check(
    x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int
) -> None:
    if not (qmin <= 0 <= qmax and qmin < qmax):
        raise ValueError(
            'expected qmin <= 0 <= qmax and qmin < qmax, got '
            f'qmin={qmin}, qmax={qmax}'
        )
    for name, tensor in (('x', x), ('step', step), ('offset', offset)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(
                f'{name}: expected a floating point tensor, got {tensor.dtype}'
            )
        # one element may stay on the CPU, as in any op of torch
        if tensor.device != x.device and tensor.dim():
            raise ValueError(
                f'{name}: expected the device of x, {x.device}, got '
                f'{tensor.device}'
            )
        sizes = zip(tensor.shape[::-1], x.shape[::-1], strict=False)
        if tensor.dim() > x.dim() or any(n not in (1, to) for n, to in sizes):
            raise ValueError(
                f'{name}: expected a shape that broadcasts to that of x, '
                f'{tuple(x.shape)}, got {tuple(tensor.shape)}'
            )
    if (
        step.device.type == 'cpu'
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not bool((step.detach() > 0).all())
    ):
        raise ValueError(
            f'step: expected positive values, got {step.min().item()}'
        )


# --- PACT -------------------------------------------------------------------


class _LearnedClip(torch.autograd.Function):
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
    ``n = 2**bits - 1``. The derivative in ``x`` is 1 on [0, alpha) and else
    0; in ``alpha`` it is 1 where ``x >= alpha`` and else 0. ``alpha`` is
    positive, of a shape that broadcasts to that of ``x``, floating point.
    Computed in float32 at least, returned in the dtype of ``x``.

    Source: Choi et al., PACT, arXiv:1805.06085, eq. 1 to 3.
    """
    n = 2**bits - 1
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = _LearnedClip.apply(wide, alpha)
    step = alpha.detach() / n
    return straight_through(y, (y.detach() / step).round() * step).to(x.dtype)


def _quantize_unit(x: Tensor, bits: int) -> Tensor:
    """``round(x n) / n`` with ``n = 2**bits - 1``, for ``x`` in [0, 1]."""
    n = 2**bits - 1
    return straight_through(x, (x * n).round() / n)


def dorefa_activation(x: Tensor, bits: int) -> Tensor:
    """``2**bits`` even levels of [0, 1]: ``quantize_k(clip(x, 0, 1))``.

    The gradient is that of the clip: 1 strictly inside (0, 1), else 0. The
    paper leaves the borders open; 0 is what learned quantizers have there.
    Any shape, computed in float32 at least, returned in the dtype of ``x``.

    Source: Zhou et al., DoReFa-Net, arXiv:1606.06160, eq. 5 and 11.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # unlike torch.clamp, without a gradient on the borders
    inside = (wide > 0) & (wide < 1)
    clipped = torch.where(inside, wide, wide.detach().clamp(0, 1))
    return _quantize_unit(clipped, bits).to(x.dtype)


def dorefa_weight(w: Tensor, bits: int) -> Tensor:
    """``2**bits`` even levels of [-1, 1].

    ``2 quantize_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1``. Its derivative is
    ``(1 - tanh(w)**2) / max|tanh(w)|``: the maximum counts as a constant and
    the rounding as the identity. With one bit the levels are ``+-mean|w|``
    and the derivative is 1. Any shape, not all zero; computed in float32 at
    least, returned in the dtype of ``w``.

    Source: Zhou et al., DoReFa-Net, arXiv:1606.06160, eq. 8 and 9.
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


# --- steps from the mean ----------------------------------------------------


def half_step_quantize(w: Tensor, step: Tensor, bits: int) -> Tensor:
    """``2**bits`` even levels around zero, none of which is zero.

    The levels are the odd multiples of ``step / 2`` from ``-n`` to ``n`` of
    them, with ``n = 2**bits - 1``; the derivative in ``w`` is 1 strictly
    between the outermost ones, else 0. The step is a constant, positive, of a
    shape that broadcasts to that of ``w``. Computed in float32 at least,
    returned in the dtype of ``w``.
    """
    n, half = 2**bits - 1, step.detach() / 2
    wide = w.to(torch.promote_types(w.dtype, torch.float32))
    v = wide.detach() / half
    code = (2 * ((v - 1) / 2).round() + 1).clamp(-n, n)
    inside = torch.where(v.abs() < n, wide, wide.detach())
    return straight_through(inside, code * half).to(w.dtype)
