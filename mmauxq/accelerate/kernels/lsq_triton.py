"""Triton kernels of the learned step quantizer.

They compute what :mod:`mmauxq.quantizers.functional` defines.

Memory is seen as (rows, channels): element ``m`` of channel ``c`` lies at
``(m // inner) * channels * inner + c * inner + m % inner``, where ``inner`` is
the stride of the channel axis. That holds for any dense layout: ``inner`` is 1
for channels-last activations, ``H W`` for (N, C, H, W) and ``I kh kw`` for the
weights of a convolution. With one step for all there is one channel, and
memory is flat.
"""

import triton
import triton.language as tl

# 1.5 * 2**23: adding and subtracting it rounds to the nearest integer, ties to
# even, for |v| < 2**22
ROUND = tl.constexpr(12582912.0)


@triton.jit
def clip(v, low, high):
    """``v`` in [low, high]; NaN stays."""
    return tl.clamp(v, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def div_rn_clipped(x, step, inverse, qmin, qmax):
    """``x / step`` to the last bit where it matters, clipped a little wider
    than the codes.

    One Newton step after the multiplication by a correctly rounded inverse
    gives the correctly rounded quotient (Markstein, 1990), in three operations
    instead of the dozen of a division. Comparisons let NaN pass.
    """
    v = clip(x * inverse, qmin - 1.0, qmax + 1.0)
    return tl.fma(tl.fma(-v, step, x), inverse, v)


@triton.jit
def quantized(x, step, inverse, offset, QMIN, QMAX, OFFSET: tl.constexpr):
    """The value of the op, float32."""
    x = x.to(tl.float32)
    if OFFSET:
        x = x - offset
    v = div_rn_clipped(x, step, inverse, QMIN * 1.0, QMAX * 1.0)
    value = ((clip(v, QMIN * 1.0, QMAX * 1.0) + ROUND) - ROUND) * step
    if OFFSET:
        value = value + offset
    return value


@triton.jit
def lsq_grad(x, grad, step, inverse, offset, QMIN, QMAX, OFFSET: tl.constexpr):
    """Gradients of x, and what each element adds to those of step, offset."""
    x = x.to(tl.float32)
    if OFFSET:
        x = x - offset
    v = div_rn_clipped(x, step, inverse, QMIN * 1.0, QMAX * 1.0)
    inside = (v > QMIN) & (v < QMAX)
    clipped = clip(v, QMIN * 1.0, QMAX * 1.0)
    rounded = (clipped + ROUND) - ROUND
    wide = grad.to(tl.float32)
    in_step = wide * tl.where(inside, rounded - v, clipped)
    return tl.where(inside, grad, 0.0), in_step, tl.where(inside, 0.0, wide)


@triton.jit
def forward_flat(
    x_ptr,
    step_ptr,
    offset_ptr,
    y_ptr,
    rows,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One step for all: ``y`` from ``x``, ROWS elements for each program.

    What lies beyond the last multiple of 16 is left to the first program, so
    that all others read 16 bytes at a time whatever the size.
    """
    step = tl.load(step_ptr).to(tl.float32)
    offset = tl.load(offset_ptr).to(tl.float32)
    inverse = tl.div_rn(1.0, step)
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    even = (rows // 16) * 16
    m = block * ROWS + tl.arange(0, ROWS)
    x = tl.load(x_ptr + m, mask=m < even, other=0.0)
    y = quantized(x, step, inverse, offset, QMIN, QMAX, OFFSET)
    tl.store(y_ptr + m, y.to(y_ptr.dtype.element_ty), mask=m < even)
    if tl.program_id(0) == 0:
        last = even + tl.arange(0, 16)
        x1 = tl.load(x_ptr + last, mask=last < rows, other=0.0)
        y1 = quantized(x1, step, inverse, offset, QMIN, QMAX, OFFSET)
        y1 = y1.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + last, y1, mask=last < rows)


@triton.jit
def backward_flat(
    grad_ptr,
    x_ptr,
    step_ptr,
    offset_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    splits,
    scale,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The gradient of ``x``, and partial sums of those of step and offset,
    (1 or 2, splits), float32: one of each program."""
    step = tl.load(step_ptr).to(tl.float32)
    offset = tl.load(offset_ptr).to(tl.float32)
    inverse = tl.div_rn(1.0, step)
    split = tl.program_id(0)
    block = split
    if WIDE:
        block = block.to(tl.int64)
    even = (rows // 16) * 16
    m = block * ROWS + tl.arange(0, ROWS)
    grad = tl.load(grad_ptr + m, mask=m < even, other=0.0)
    x = tl.load(x_ptr + m, mask=m < even, other=0.0)
    grad_x, in_step, in_offset = lsq_grad(
        x, grad, step, inverse, offset, QMIN, QMAX, OFFSET
    )
    grad_x = grad_x.to(grad_x_ptr.dtype.element_ty)
    tl.store(grad_x_ptr + m, grad_x, mask=m < even)
    total, offset_total = tl.sum(in_step, 0), tl.sum(in_offset, 0)
    if split == 0:
        last = even + tl.arange(0, 16)
        grad1 = tl.load(grad_ptr + last, mask=last < rows, other=0.0)
        x1 = tl.load(x_ptr + last, mask=last < rows, other=0.0)
        grad_x1, in_step1, in_offset1 = lsq_grad(
            x1, grad1, step, inverse, offset, QMIN, QMAX, OFFSET
        )
        grad_x1 = grad_x1.to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + last, grad_x1, mask=last < rows)
        total += tl.sum(in_step1, 0)
        offset_total += tl.sum(in_offset1, 0)
    tl.store(partial_ptr + split, total * scale)
    if OFFSET:
        tl.store(partial_ptr + splits + split, offset_total * scale)


@triton.jit
def place(channels, CHANNELS, repeats, WIDE: tl.constexpr):
    """Where this program works: its number in a column of programs, its first
    row of tiles (int64 if WIDE), and the channels of its column."""
    columns = tl.cdiv(channels, CHANNELS)
    column = tl.program_id(0) % columns
    split = tl.program_id(0) // columns
    first = split * repeats
    if WIDE:
        first = first.to(tl.int64)
    return split, first, column * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def tile(block, c, rows, channels, inner, ROWS):
    """Where the elements of a tile lie, and which of them exist."""
    m = block * ROWS + tl.arange(0, ROWS)
    starts = (m // inner) * (channels * inner) + m % inner
    places = starts[:, None] + (c * inner)[None, :]
    return places, (m < rows)[:, None] & (c < channels)[None, :]


@triton.jit
def load_per_channel(ptr, c, channels, other=0.0):
    """A value of each channel of a tile, (1, CHANNELS), float32."""
    value = tl.load(ptr + c, mask=c < channels, other=other)
    return value.to(tl.float32)[None, :]


@triton.jit
def forward_channels(
    x_ptr,
    step_ptr,
    offset_ptr,
    y_ptr,
    rows,
    channels,
    inner,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A step for each channel; a tile of ROWS x CHANNELS for each program."""
    _, block, c = place(channels, CHANNELS, 1, WIDE)
    step = load_per_channel(step_ptr, c, channels, 1.0)
    offset = load_per_channel(offset_ptr, c, channels)
    inverse = tl.div_rn(1.0, step)
    places, mask = tile(block, c, rows, channels, inner, ROWS)
    x = tl.load(x_ptr + places, mask=mask, other=0.0)
    y = quantized(x, step, inverse, offset, QMIN, QMAX, OFFSET)
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_channels(
    grad_ptr,
    x_ptr,
    step_ptr,
    offset_ptr,
    grad_x_ptr,
    partial_ptr,
    rows,
    channels,
    inner,
    repeats,
    splits,
    scale,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradients with a step for each channel: the sums of a program, (1 or 2,
    splits, channels), go over ``repeats`` tiles, in an order that is fixed."""
    split, first, c = place(channels, CHANNELS, repeats, WIDE)
    step = load_per_channel(step_ptr, c, channels, 1.0)
    offset = load_per_channel(offset_ptr, c, channels)
    inverse = tl.div_rn(1.0, step)
    step_sum = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    offset_sum = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    i = 0
    while i < repeats:
        places, mask = tile(first + i, c, rows, channels, inner, ROWS)
        grad = tl.load(grad_ptr + places, mask=mask, other=0.0)
        x = tl.load(x_ptr + places, mask=mask, other=0.0)
        grad_x, in_step, in_offset = lsq_grad(
            x, grad, step, inverse, offset, QMIN, QMAX, OFFSET
        )
        grad_x = grad_x.to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + places, grad_x, mask=mask)
        step_sum += in_step
        if OFFSET:
            offset_sum += in_offset
        i += 1
    out = partial_ptr + split * channels + c
    tl.store(out, tl.sum(step_sum, 0) * scale, mask=c < channels)
    if OFFSET:
        out += splits * channels
        tl.store(out, tl.sum(offset_sum, 0) * scale, mask=c < channels)
