"""Triton kernels of a batch norm and what follows it; see :mod:`.norm`.

Memory is seen as (rows, channels), channels side by side: N H W rows for a
channels-last feature map.
"""

import triton
import triton.language as tl

from .lsq_triton import load_per_channel, lsq_grad, place, quantized, tile


@triton.jit
def statistics_kernel(
    z_ptr,
    partial_ptr,
    rows,
    channels,
    repeats,
    splits,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums of ``z - z[0]`` and of its square, (2, splits, channels). Without
    the shift the variance is lost in the square of the mean."""
    split, first, c = place(channels, CHANNELS, repeats, WIDE)
    total = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    squares = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    start = load_per_channel(z_ptr, c, channels)
    i = 0
    while i < repeats:  # the interpreter cannot count to a tensor
        offsets, mask = tile(first + i, c, rows, channels, 1, ROWS)
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, z - start, 0.0)
        total += d
        squares += d * d
        i += 1
    out = partial_ptr + split * channels + c
    tl.store(out, tl.sum(total, 0), mask=c < channels)
    out += splits * channels
    tl.store(out, tl.sum(squares, 0), mask=c < channels)


@triton.jit
def update_running(mean_ptr, var_ptr, c, exists, mean, var, rows, momentum):
    """Bring running statistics nearer to those of a batch of ``rows``."""
    old = tl.load(mean_ptr + c, mask=exists, other=0.0)
    new = old + momentum * (mean - old)
    tl.store(mean_ptr + c, new, mask=exists)
    old = tl.load(var_ptr + c, mask=exists, other=0.0)
    new = old + momentum * (var * (rows / (rows - 1.0)) - old)
    tl.store(var_ptr + c, new, mask=exists)


@triton.jit
def column_sums(
    ptr, c, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Sums over the rows of a matrix (rows, channels), for the channels c."""
    total = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    block = 0
    while block * ROWS < rows:
        offsets, mask = tile(block, c, rows, channels, 1, ROWS)
        total += tl.load(ptr + offsets, mask=mask, other=0.0)
        block += 1
    return tl.sum(total, 0)


@triton.jit
def finish_kernel(
    z_ptr,
    partial_ptr,
    mean_ptr,
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    rows,
    channels,
    splits,
    eps,
    momentum,
    RUNNING: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and 1 / standard deviation of each channel, from partial sums."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = column_sums(partial_ptr, c, splits, channels, ROWS, CHANNELS)
    squares = column_sums(
        partial_ptr + splits * channels, c, splits, channels, ROWS, CHANNELS
    )  # fmt: skip
    exists = c < channels
    n = rows * 1.0
    shift = total / n
    var = tl.maximum(squares / n - shift * shift, 0.0)
    start = tl.load(z_ptr + c, mask=exists, other=0.0).to(tl.float32)
    mean = start + shift
    tl.store(mean_ptr + c, mean, mask=exists)
    tl.store(rstd_ptr + c, 1.0 / tl.sqrt(var + eps), mask=exists)
    if RUNNING:
        update_running(
            running_mean_ptr, running_var_ptr, c, exists, mean, var, n,
            momentum,
        )  # fmt: skip


@triton.jit
def activation(
    z, identity, mean, factor, bias,
    IDENTITY: tl.constexpr, BOUND: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """What the batch norm and the operations after it make of ``z``, rounded
    where separate operations would round. ``BOUND`` is that of a ReLU, or 0
    without one."""
    y = ((z - mean) * factor + bias).to(TYPE).to(tl.float32)
    if IDENTITY:
        y = (y + identity).to(TYPE).to(tl.float32)
    if BOUND > 0:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if BOUND < float('inf'):
            y = tl.minimum(y, BOUND, propagate_nan=tl.PropagateNan.ALL)
    return y


@triton.jit
def forward_kernel(
    z_ptr,
    identity_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    step_ptr,
    x_ptr,
    out_ptr,
    rows,
    channels,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    IDENTITY: tl.constexpr,
    BOUND: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BOTH: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Normalise, add, rectify, quantize: one tile for each program. ``out`` is
    the last of these; with BOTH, ``x`` is what is quantized."""
    _, block, c = place(channels, CHANNELS, 1, WIDE)
    offsets, mask = tile(block, c, rows, channels, 1, ROWS)
    mean = load_per_channel(mean_ptr, c, channels)
    rstd = load_per_channel(rstd_ptr, c, channels)
    factor = rstd * load_per_channel(weight_ptr, c, channels)
    bias = load_per_channel(bias_ptr, c, channels)
    z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    identity = z
    if IDENTITY:
        identity = tl.load(identity_ptr + offsets, mask=mask, other=0.0)
        identity = identity.to(tl.float32)
    y = activation(
        z, identity, mean, factor, bias, IDENTITY, BOUND,
        z_ptr.dtype.element_ty,
    )  # fmt: skip
    if BOTH:
        tl.store(x_ptr + offsets, y.to(x_ptr.dtype.element_ty), mask=mask)
    if QUANTIZE:
        step = tl.load(step_ptr).to(tl.float32)
        inverse = tl.div_rn(1.0, step)
        y = quantized(y, step, inverse, 0.0, QMIN, QMAX, False)
    tl.store(out_ptr + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def incoming(
    grad_ptr, other_ptr, more_ptr, z_ptr, x_ptr, offsets, mask, mean, factor,
    bias, step, inverse, QMIN, QMAX, BOUND: tl.constexpr,
    QUANTIZE: tl.constexpr, OTHERS: tl.constexpr, READ: tl.constexpr,
    HAS_Z: tl.constexpr = True,
):  # fmt: skip
    """Gradient of the batch norm's result; what an element adds to that of
    the step; and z, or what stands for it where nobody needs it.

    ``x`` is what the activation gave: read, or made again from z. ``other``
    and ``more`` are its own gradients, on top of which comes that of a
    quantizer; OTHERS says how many there are.
    """
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    z = grad
    if HAS_Z:
        z = tl.load(z_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    TYPE: tl.constexpr = z_ptr.dtype.element_ty
    x = z
    if READ:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    elif QUANTIZE:
        x = activation(z, z, mean, factor, bias, False, BOUND, TYPE)
    in_step = grad
    if QUANTIZE:
        grad, in_step, _ = lsq_grad(
            x, grad, step, inverse, 0.0, QMIN, QMAX, False
        )
    if OTHERS > 0:
        other = tl.load(other_ptr + offsets, mask=mask, other=0.0)
        other = other.to(tl.float32)
        if OTHERS > 1:
            more = tl.load(more_ptr + offsets, mask=mask, other=0.0)
            other = (other + more.to(tl.float32)).to(TYPE).to(tl.float32)
        grad = (grad + other).to(TYPE).to(tl.float32)
    if BOUND > 0:
        inside = x > 0.0
        if BOUND < float('inf'):
            inside = inside & (x < BOUND)
        grad = tl.where(inside, grad, 0.0)
    return grad, in_step, z


@triton.jit
def reduce_kernel(
    grad_ptr,
    other_ptr,
    more_ptr,
    z_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    step_ptr,
    partial_ptr,
    step_partial_ptr,
    grad_identity_ptr,
    rows,
    channels,
    repeats,
    splits,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    IDENTITY: tl.constexpr,
    BOUND: tl.constexpr,
    QUANTIZE: tl.constexpr,
    OTHERS: tl.constexpr,
    READ: tl.constexpr,
    HAS_Z: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Partial sums of the gradients of bias and weight, (2, splits,
    channels), and with a quantizer of that of its step, one for each program.
    With IDENTITY also its gradient, that of the batch norm's result. Without z
    that of the weight means nothing."""
    split, first, c = place(channels, CHANNELS, repeats, WIDE)
    mean = load_per_channel(mean_ptr, c, channels)
    rstd = load_per_channel(rstd_ptr, c, channels)
    factor = rstd * load_per_channel(weight_ptr, c, channels)
    bias = load_per_channel(bias_ptr, c, channels)
    step = 1.0
    inverse = 1.0
    if QUANTIZE:
        step = tl.load(step_ptr).to(tl.float32)
        inverse = tl.div_rn(1.0, step)
    bias_sum = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    weight_sum = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    step_sum = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    i = 0
    while i < repeats:
        offsets, mask = tile(first + i, c, rows, channels, 1, ROWS)
        g, in_step, z = incoming(
            grad_ptr, other_ptr, more_ptr, z_ptr, x_ptr, offsets, mask, mean,
            factor, bias, step, inverse, QMIN, QMAX, BOUND, QUANTIZE, OTHERS,
            READ, HAS_Z,
        )  # fmt: skip
        if IDENTITY:
            same = g.to(grad_identity_ptr.dtype.element_ty)
            tl.store(grad_identity_ptr + offsets, same, mask=mask)
        bias_sum += g
        weight_sum = tl.fma(g, z - mean, weight_sum)
        if QUANTIZE:
            step_sum += in_step
        i += 1
    exists = c < channels
    out = partial_ptr + split * channels + c
    tl.store(out, tl.sum(bias_sum, 0), mask=exists)
    out += splits * channels
    rstd1 = tl.load(rstd_ptr + c, mask=exists, other=0.0)
    tl.store(out, tl.sum(weight_sum, 0) * rstd1, mask=exists)
    if QUANTIZE:
        in_program = tl.sum(tl.sum(step_sum, 0), 0)
        tl.store(step_partial_ptr + tl.program_id(0), in_program)


@triton.jit
def sum_kernel(
    partial_ptr,
    step_partial_ptr,
    sums_ptr,
    grad_step_ptr,
    grad_scale,
    channels,
    splits,
    programs,
    columns,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients of bias and weight, (2, channels), from the partial sums of
    :func:`reduce_kernel`, in two programs for each of ``columns`` of channels.
    One program more gives the gradient of the step."""
    of = tl.program_id(0) // columns
    if of < 2:
        c = (tl.program_id(0) % columns) * CHANNELS + tl.arange(0, CHANNELS)
        total = column_sums(
            partial_ptr + of * splits * channels, c, splits, channels, ROWS,
            CHANNELS,
        )  # fmt: skip
        tl.store(sums_ptr + of * channels + c, total, mask=c < channels)
    else:
        c = tl.arange(0, CHANNELS)
        rows = tl.cdiv(programs, CHANNELS)
        of_step = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
        block = 0
        while block * ROWS < rows:
            offsets, _ = tile(block, c, rows, CHANNELS, 1, ROWS)
            of_step += tl.load(
                step_partial_ptr + offsets, mask=offsets < programs, other=0.0
            )  # fmt: skip
            block += 1
        of_step_sum = tl.sum(tl.sum(of_step, 0), 0)
        tl.store(grad_step_ptr, of_step_sum * grad_scale)


@triton.jit
def backward_kernel(
    grad_ptr,
    other_ptr,
    more_ptr,
    z_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    step_ptr,
    sums_ptr,
    grad_z_ptr,
    rows,
    channels,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    BOUND: tl.constexpr,
    QUANTIZE: tl.constexpr,
    OTHERS: tl.constexpr,
    READ: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradient of ``z``; ``sums`` are those of bias and weight,
    (2, channels)."""
    _, block, c = place(channels, CHANNELS, 1, WIDE)
    offsets, mask = tile(block, c, rows, channels, 1, ROWS)
    mean = load_per_channel(mean_ptr, c, channels)
    rstd = load_per_channel(rstd_ptr, c, channels)
    factor = rstd * load_per_channel(weight_ptr, c, channels)
    bias = load_per_channel(bias_ptr, c, channels)
    step = 1.0
    inverse = 1.0
    if QUANTIZE:
        step = tl.load(step_ptr).to(tl.float32)
        inverse = tl.div_rn(1.0, step)
    g, _, z = incoming(
        grad_ptr, other_ptr, more_ptr, z_ptr, x_ptr, offsets, mask, mean,
        factor, bias, step, inverse, QMIN, QMAX, BOUND, QUANTIZE, OTHERS, READ,
    )  # fmt: skip
    n = rows * 1.0
    shift = factor * load_per_channel(sums_ptr, c, channels) / n
    weight_sum = load_per_channel(sums_ptr + channels, c, channels)
    slope = factor * rstd * weight_sum / n
    grad_z = tl.fma(factor, g, -tl.fma(z - mean, slope, shift))
    grad_z = grad_z.to(grad_z_ptr.dtype.element_ty)
    tl.store(grad_z_ptr + offsets, grad_z, mask=mask)
