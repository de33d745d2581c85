"""The learned step by kernels, and as one operator of torch.

Each direction is one pass over memory; the gradients of step and offset are
summed in two stages, in an order that never changes. The operator
``mmauxq::learned_step_quantize`` and its backward are single nodes for
``torch.compile`` and ``torch.export``; where there is no kernel, they compute
what :mod:`mmauxq.quantizers.functional` defines.
"""

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
    on_device,
    runs_triton,
    wants_kernel,
)
from .tiles import is_wide, power_of_two, split_k

# Sizes of tiles, the best of a sweep on one NVIDIA H200. Where one step serves
# all, a program has one tile, of so many elements:
FORWARD_VALUES, FORWARD_WARPS = 2048, 4
BACKWARD_VALUES, BACKWARD_WARPS = 8192, 8
# Where each channel has a step, (elements, channels) of a tile; backward, a
# program sums over several tiles.
FORWARD_TILE = (8192, 128)
BACKWARD_TILE = (2048, 256)
PROGRAMS_PER_MULTIPROCESSOR = 4


def channel_axis(step: Tensor, x: Tensor) -> int | None:
    """The axis of ``x`` along which ``step`` varies; ``None`` if it does not.

    Raises:
        NotImplementedError: If it varies along several.
    """
    axes = [i for i, size in enumerate(step.shape) if size != 1]
    if not axes:
        return None
    if len(axes) > 1:
        raise NotImplementedError('a step along several axes')
    return axes[0] + x.dim() - step.dim()


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


def _channel_tiles(
    x: Tensor, step: Tensor, tile: tuple[int, int]
) -> tuple[int, int, dict]:
    """Rows of tiles, columns of tiles, and the arguments that describe them.

    Args:
        x: What is quantized.
        step: Its steps.
        tile: Elements of a tile, and channels in it at the most.
    """
    axis = channel_axis(step, x)
    assert axis is not None
    values, width = tile
    channels, inner = x.shape[axis], x.stride(axis)
    width = min(power_of_two(channels), width) if inner == 1 else 1
    rows = x.numel() // channels
    height = min(power_of_two(rows), values // width)
    arguments = dict(
        rows=rows, channels=channels, inner=inner,
        WIDE=is_wide(x), ROWS=height, CHANNELS=width,
    )  # fmt: skip
    return -(-rows // height), -(-channels // width), arguments


def learned_step_backend(
    x: Tensor,
    step: Tensor,
    qmin: int,
    qmax: int,
    offset: Tensor | None,
    grad_scale: float,
) -> Tensor | None:
    """:func:`~mmauxq.quantizers.functional.learned_step_quantize` by kernels.

    Returns:
        ``None`` where the definition shall run.
    """
    if not (wants_kernel(x) and can_run(x, step, offset)):
        return None
    if torch.compiler.is_compiling() or not runs_triton(x):
        return quantize(x, step, offset, qmin, qmax, float(grad_scale))
    # the operator of torch would cost the host as much again
    return LearnedStepFunction.apply(
        x, step, offset, qmin, qmax, grad_scale, run_forward, run_backward
    )


def run_forward(
    x: Tensor, step: Tensor, offset: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    """The result of :func:`~mmauxq.quantizers.functional.lsq_forward`, with
    the same arguments, in one launch."""
    from .lsq_triton import forward_channels, forward_flat

    y = torch.empty_like(x)
    if step.numel() == 1:
        kernel, warps = forward_flat, FORWARD_WARPS
        programs = -(-x.numel() // FORWARD_VALUES)
        tiles = dict(rows=x.numel(), WIDE=is_wide(x), ROWS=FORWARD_VALUES)
    else:
        kernel, warps = forward_channels, 8
        blocks, columns, tiles = _channel_tiles(x, step, FORWARD_TILE)
        programs = blocks * columns
    with on_device(x):
        kernel[(programs,)](
            x,
            step.contiguous(),
            step if offset is None else offset.contiguous(),
            y,
            QMIN=qmin,
            QMAX=qmax,
            OFFSET=offset is not None,
            num_warps=warps,
            enable_fp_fusion=False,
            **tiles,
        )
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
    """The result of :func:`~mmauxq.quantizers.functional.lsq_backward`, with
    the same arguments, in one launch and a small sum."""
    from .lsq_triton import backward_channels, backward_flat

    if grad.stride() != x.stride() or grad.dtype != x.dtype:
        grad = torch.empty_like(x).copy_(grad)
    grad_x = torch.empty_like(x)
    if step.numel() == 1:
        kernel, warps = backward_flat, BACKWARD_WARPS
        programs = splits = -(-x.numel() // BACKWARD_VALUES)
        tiles = dict(rows=x.numel(), WIDE=is_wide(x), ROWS=BACKWARD_VALUES)
    else:
        kernel, warps = backward_channels, 8
        blocks, columns, tiles = _channel_tiles(x, step, BACKWARD_TILE)
        splits, repeats = split_k(
            blocks, columns, x, PROGRAMS_PER_MULTIPROCESSOR
        )
        programs = splits * columns
        tiles.update(repeats=repeats)
    partial = torch.empty(
        (1 if offset is None else 2, splits, step.numel()),
        dtype=torch.float32,
        device=x.device,
    )
    with on_device(x):
        kernel[(programs,)](
            grad,
            x,
            step.contiguous(),
            step if offset is None else offset.contiguous(),
            grad_x,
            partial,
            splits=splits,
            scale=grad_scale,
            QMIN=qmin,
            QMAX=qmax,
            OFFSET=offset is not None,
            num_warps=warps,
            enable_fp_fusion=False,
            **tiles,
        )
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
    """The op of torch, see :func:`learned_step_backend`."""
    if runs_triton(x) and can_run(x, step, offset):
        return run_forward(x, step, offset, qmin, qmax)
    return _like(lsq_forward(x, step, offset, qmin, qmax), x)


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
    """Gradients of ``x``, ``step`` and ``offset`` (of 0 elements if ``None``).

    Args:
        grad: Gradient of the result, in the shape of ``x``.
        x: What was quantized.
        step: Its steps, of a shape that broadcasts to ``x``.
        offset: Of the shape of ``step``, or ``None``.
        qmin: Lowest code.
        qmax: Highest code.
        grad_scale: Factor on the gradients of ``step`` and ``offset``.
    """
    run = lsq_backward
    if runs_triton(x) and can_run(x, step, offset):
        run = run_backward
    found = run(grad, x, step, offset, qmin, qmax, grad_scale)
    grad_x, grad_step = _like(found[0], x), found[1].to(step.dtype)
    if found[2] is None:
        return grad_x, grad_step, step.new_empty(0)
    return grad_x, grad_step, found[2].to(step.dtype)


@quantize_backward.register_fake
def _(grad, x, step, offset, qmin, qmax, grad_scale):
    return (
        torch.empty_like(x),
        step.new_empty(step.shape),
        step.new_empty(0 if offset is None else offset.shape),
    )


def _like(value: Tensor, x: Tensor) -> Tensor:
    """``value`` in the layout and dtype of ``x``, in memory of its own."""
    return torch.empty_like(x).copy_(value)


def _save(ctx, inputs, output) -> None:
    x, step, offset, *ctx.range = inputs
    ctx.save_for_backward(x, step, offset)


def _backward(ctx, grad):
    x, step, offset = ctx.saved_tensors
    grads = quantize_backward(grad, x, step, offset, *ctx.range)
    needed = [
        g if needs else None
        for g, needs in zip(grads, ctx.needs_input_grad, strict=False)
    ]
    return *needed, None, None, None


quantize.register_autograd(_backward, setup_context=_save)
