"""LSQ and LSQ+: a learned step, and a learned offset."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from .dispatch import runs_triton, wants_kernel


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
    # under torch.compile (2.11), a result that comes of a .to() without
    # effect gets no gradient, and nothing says so
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
    """The gradients of :func:`learned_step_quantize`.

    Returns:
        Those of ``x``, of ``step`` and of ``offset``.
    """
    wide_grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    wide = x.to(wide_grad.dtype)
    if offset is not None:
        wide = wide - offset
    # to the bit wide / step; but of the very quotient of the forward pass a
    # compiler may think that it should be kept in memory until now, in float32
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
    """The sum of ``x`` over the axes along which ``shape`` does not vary.

    A sum over everything goes by channels first: of that form is the backward
    pass of a batch norm, so that a compiler reads the tensor once for both.
    """
    if shape.numel() == 1 and x.dim() > 2:
        channel = 1 if x.dim() > 3 else x.dim() - 1
        x = x.sum([i for i in range(x.dim()) if i != channel])
        return x.sum().reshape(shape)
    return x.sum_to_size(shape)


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
        forward: Callable,
        backward: Callable,
    ) -> Tensor:
        ctx.save_for_backward(x, step, offset)
        ctx.range = (qmin, qmax, grad_scale)
        ctx.run_backward = backward
        return forward(x, step, offset, qmin, qmax)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, step, offset = ctx.saved_tensors
        grads = ctx.run_backward(grad, x, step, offset, *ctx.range)
        needed = [
            g if needs else None
            for g, needs in zip(grads, ctx.needs_input_grad, strict=False)
        ]
        return *needed, None, None, None, None, None


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
    to nearest, ties to even, as in ONNX ``QuantizeLinear``. On a GPU a kernel
    computes the same; see :func:`mmauxq.ops.use_form`.

    Sources: Esser et al., Learned Step Size Quantization, arXiv:1902.08153,
    eq. 1 to 5; Bhalgat et al., LSQ+, arXiv:2004.09576, eq. 1 to 6.

    Args:
        x: Any shape, floating point.
        step: Positive, of a shape that broadcasts to that of ``x``. On a GPU
            the sign is not looked at: that would stall every call.
        qmin: Lowest code, at most 0.
        qmax: Highest code, above ``qmin``.
        offset: As ``step``; ``None`` for 0.
        grad_scale: Factor on the gradients of ``step`` and ``offset``; LSQ
            has ``1 / sqrt(number of values * qmax)``.

    Returns:
        The shape and dtype of ``x``, with at most ``qmax - qmin + 1``
        distinct values for each element of ``step``.

    Raises:
        TypeError: If ``x``, ``step`` or ``offset`` is not floating point.
        ValueError: If a shape, a device or the range does not fit.
    """
    if has_torch_function_unary(x):  # a mode that looks on, such as
        # mmauxq.layers.LessMemory
        return handle_torch_function(
            learned_step_quantize,
            (x,),
            x,
            step,
            qmin,
            qmax,
            offset=offset,
            grad_scale=grad_scale,
        )
    _check(x, step, offset, qmin, qmax)
    forms = (lsq_forward, lsq_backward)
    if wants_kernel(x):
        from . import lsq_fused

        if lsq_fused.can_run(x, step, offset):
            if torch.compiler.is_compiling() or not runs_triton(x):
                return lsq_fused.quantize(
                    x, step, offset, qmin, qmax, float(grad_scale)
                )
            # the operator of torch would cost the host as much again
            forms = (lsq_fused.run_forward, lsq_fused.run_backward)
    return _LearnedStepQuantize.apply(
        x, step, offset, qmin, qmax, grad_scale, *forms
    )


def _check(
    x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int
) -> None:
    if not (qmin <= 0 <= qmax and qmin < qmax):
        raise ValueError(
            f'qmin={qmin}, qmax={qmax}; needed are qmin <= 0 <= qmax, '
            'not equal'
        )
    for name, tensor in (('x', x), ('step', step), ('offset', offset)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f'{name} is {tensor.dtype}; needed is a float')
        # one element may stay on the CPU, as in any op of torch
        if tensor.device != x.device and tensor.dim():
            raise ValueError(f'{name} is on {tensor.device}, x on {x.device}')
        if tensor is not x and not _broadcasts(tensor.shape, x.shape):
            raise ValueError(
                f'{name} of shape {tuple(tensor.shape)} does not broadcast '
                f'to x of shape {tuple(x.shape)}'
            )
    if (
        step.device.type == 'cpu'
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not bool((step.detach() > 0).all())
    ):
        raise ValueError(f'step={step.min().item()}; needed is a positive one')


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        size in (1, whole)
        for size, whole in zip(reversed(shape), reversed(to), strict=False)
    )
