"""The learned step by kernels, and as one operator of torch.

Each direction is one pass over memory; the gradients of step and offset are
summed in two stages, in an order that never changes. The operator
``mmauxq::learned_step_quantize`` and its backward are single nodes for
``torch.compile`` and ``torch.export``; where there is no kernel, they compute
what :mod:`mmauxq.quantizers.functional` defines.
"""

from typing import Any

import torch
from torch import Tensor

from mmauxq.quantizers.functional import (
    LearnedStepFunction,
    lsq_backward,
    lsq_forward,
)

from .dispatch import (
    KERNEL_DTYPES,
    fall_back,
    is_dense,
    runs_triton,
    wants_kernel,
)
from .tiles import is_wide, laid_out_like, launch, split_tiles, tiles

# Sizes of tiles, the best of a sweep on one NVIDIA H200. Where one step serves
# all, a program has one tile, of so many elements:
FORWARD_VALUES, FORWARD_WARPS = 2048, 4
BACKWARD_VALUES, BACKWARD_WARPS = 8192, 8
# Where each channel has a step, (elements, channels) of a tile; backward, a
# program sums over several tiles.
FORWARD_TILE = (8192, 128)
BACKWARD_TILE = (2048, 256)
PROGRAMS_PER_MULTIPROCESSOR = 4


def can_run(x: Tensor, step: Tensor, offset: Tensor | None) -> bool:
    """Whether there is a kernel for these; logs once if not."""
    if x.numel() == 0:
        return False  # nothing to launch
    obstacle = _obstacle(x, step, offset)
    if obstacle:
        fall_back(obstacle)
    return not obstacle


def _obstacle(x: Tensor, step: Tensor, offset: Tensor | None) -> str:
    for tensor in (x, step):
        if tensor.dtype not in KERNEL_DTYPES:
            return f'dtype {tensor.dtype}'
    if step.device != x.device:
        return f'step on {step.device}, x on {x.device}'
    if sum(size != 1 for size in step.shape) > 1:
        return 'a step along several axes'
    if offset is not None and (
        offset.shape != step.shape
        or offset.dtype != step.dtype
        or offset.device != step.device
    ):
        return 'step and offset that are not alike'
    return '' if is_dense(x) else 'a layout with gaps'


def learned_step_backend(
    x: Tensor,
    step: Tensor,
    qmin: int,
    qmax: int,
    offset: Tensor | None,
    grad_scale: float,
) -> Tensor | None:
    """:func:`~mmauxq.quantizers.functional.learned_step_quantize` by kernels;
    ``None`` where the definition shall run."""
    if not (wants_kernel(x) and can_run(x, step, offset)):
        return None
    if torch.compiler.is_compiling() or not runs_triton(x):
        return quantize(x, step, offset, qmin, qmax, float(grad_scale))
    # the operator of torch would cost the host as much again
    return LearnedStepFunction.apply(
        x, step, offset, qmin, qmax, grad_scale, run_forward, run_backward
    )


def _axis(x: Tensor, step: Tensor) -> int:
    """The axis of ``x`` along which ``step`` varies."""
    (axis,) = (i for i, size in enumerate(step.shape) if size != 1)
    return axis + x.dim() - step.dim()


def _scales(
    step: Tensor, offset: Tensor | None, qmin: int, qmax: int
) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """What every kernel takes of the quantizer."""
    step = step.contiguous()
    pair = step, step if offset is None else offset.contiguous()
    return pair, dict(QMIN=qmin, QMAX=qmax, OFFSET=offset is not None)


def run_forward(
    x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    """:func:`~mmauxq.quantizers.functional.lsq_forward` in one launch."""
    from .lsq_triton import forward_channels, forward_flat

    y = torch.empty_like(x)
    how: dict[str, Any]
    if step.numel() == 1:
        kernel, warps = forward_flat, FORWARD_WARPS
        programs = -(-x.numel() // FORWARD_VALUES)
        how = dict(rows=x.numel(), WIDE=is_wide(x), ROWS=FORWARD_VALUES)
    else:
        kernel, warps, axis = forward_channels, 8, _axis(x, step)
        blocks, columns, how = tiles(x, axis, FORWARD_TILE)
        programs = blocks * columns
        how.update(inner=x.stride(axis))
    scales, codes = _scales(step, offset, qmin, qmax)
    launch(kernel, x, programs, x, *scales, y, **codes, **how, num_warps=warps)
    return y


def run_backward(
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """:func:`~mmauxq.quantizers.functional.lsq_backward` in one launch and a
    small sum."""
    from .lsq_triton import backward_channels, backward_flat

    how: dict[str, Any]
    if step.numel() == 1:
        kernel, warps = backward_flat, BACKWARD_WARPS
        programs = -(-x.numel() // BACKWARD_VALUES)
        how = dict(rows=x.numel(), WIDE=is_wide(x), ROWS=BACKWARD_VALUES)
        how.update(splits=programs)
    else:
        kernel, warps, axis = backward_channels, 8, _axis(x, step)
        programs, how = split_tiles(
            x, axis, BACKWARD_TILE, PROGRAMS_PER_MULTIPROCESSOR
        )
        how.update(inner=x.stride(axis))
    grad_x = torch.empty_like(x)
    partial = torch.empty(
        (1 if offset is None else 2, how['splits'], step.numel()),
        dtype=torch.float32,
        device=x.device,
    )
    grad = laid_out_like(grad, x, x.dtype)
    scales, codes = _scales(step, offset, qmin, qmax)
    launch(
        kernel, x, programs, grad, x, *scales, grad_x, partial,
        scale=grad_scale, **codes, **how, num_warps=warps,
    )  # fmt: skip
    grads = [
        part.sum(0).reshape(step.shape).to(step.dtype) for part in partial
    ]
    return grad_x, grads[0], None if offset is None else grads[1]


@torch.library.custom_op('mmauxq::learned_step_quantize', mutates_args=())
def quantize(
    x: Tensor,
    step: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    grad_scale: float,
) -> Tensor:
    """The operator of torch, see :func:`learned_step_backend`."""
    if runs_triton(x) and can_run(x, step, offset):
        return run_forward(x, step, offset, qmin, qmax)
    return laid_out_like(lsq_forward(x, step, offset, qmin, qmax), x, x.dtype)


@quantize.register_fake
def _(x, step, offset, qmin, qmax, grad_scale):
    return torch.empty_like(x)


@torch.library.custom_op(
    'mmauxq::learned_step_quantize_backward', mutates_args=()
)
def quantize_backward(
    grad: Tensor,
    x: Tensor,
    step: Tensor,
    offset: Tensor | None,
    qmin: int,
    qmax: int,
    grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of :func:`quantize`, with its arguments: those of ``x``,
    ``step`` and ``offset`` (of 0 elements if that is ``None``)."""
    run = lsq_backward
    if runs_triton(x) and can_run(x, step, offset):
        run = run_backward
    grad_x, grad_step, grad_offset = run(
        grad, x, step, offset, qmin, qmax, grad_scale
    )
    if grad_offset is None:
        grad_offset = step.new_empty(0)
    return (
        laid_out_like(grad_x, x, x.dtype),
        grad_step.to(step.dtype),
        grad_offset.to(step.dtype),
    )


@quantize_backward.register_fake
def _(grad, x, step, offset, qmin, qmax, grad_scale):
    return (
        torch.empty_like(x),
        step.new_empty(step.shape),
        step.new_empty(0 if offset is None else offset.shape),
    )


def _save(ctx, inputs, output) -> None:
    x, step, offset, *ctx.range = inputs
    ctx.save_for_backward(x, step, offset)
    ctx.run_backward = quantize_backward


def _backward(ctx, grad):
    grads = LearnedStepFunction.backward(ctx, grad)[:6]
    # the compiler refuses a gradient of what needs none
    pairs = zip(grads, ctx.needs_input_grad, strict=True)
    return tuple(each if needed else None for each, needed in pairs)


quantize.register_autograd(_backward, setup_context=_save)
