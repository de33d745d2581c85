"""Triton kernels of the learned step; :mod:`.lsq` defines what they compute.

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
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def quotient(x, step, inverse, qmin, qmax):
    """``x / step`` to the last bit where it matters, clipped a little wider
    than the codes.

    One Newton step after the multiplication by a correctly rounded inverse
    gives the correctly rounded quotient (Markstein, 1990) for three operations
    instead of a division's dozen. Comparisons let NaN pass.
    """
    v = clip(x * inverse, qmin - 1.0, qmax + 1.0)
    return tl.fma(tl.fma(-v, step, x), inverse, v)


@triton.jit
def forward_kernel(
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
    PER_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``y`` from ``x``, one tile of ROWS x CHANNELS for each program."""
    pid = tl.program_id(0)
    if PER_CHANNEL:
        tiles = tl.cdiv(channels, CHANNELS)
        c = (pid % tiles) * CHANNELS + tl.arange(0, CHANNELS)
        block = pid // tiles
    else:
        block = pid
    if WIDE:
        block = block.to(tl.int64)
    m = block * ROWS + tl.arange(0, ROWS)
    if PER_CHANNEL:
        places = ((m // inner) * (channels * inner) + m % inner)[:, None] + (
            c * inner
        )[None, :]
        mask = (m < rows)[:, None] & (c < channels)[None, :]
        step = tl.load(step_ptr + c, mask=c < channels, other=1.0)[None, :]
        if OFFSET:
            offset = tl.load(offset_ptr + c, mask=c < channels, other=0.0)
            offset = offset[None, :].to(tl.float32)
    else:
        places = m
        mask = m < rows
        step = tl.load(step_ptr)
        if OFFSET:
            offset = tl.load(offset_ptr).to(tl.float32)
    step = step.to(tl.float32)
    x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
    if OFFSET:
        x = x - offset
    v = quotient(x, step, tl.div_rn(1.0, step), QMIN, QMAX)
    value = ((clip(v, QMIN * 1.0, QMAX * 1.0) + ROUND) - ROUND) * step
    if OFFSET:
        value = value + offset
    tl.store(y_ptr + places, value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
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
    PER_CHANNEL: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradient of ``x``, and partial sums of those of step and offset.

    ``partial`` is (1 or 2, splits, channels), float32: what each program found
    over ``repeats`` tiles, in a fixed order.
    """
    pid = tl.program_id(0)
    if PER_CHANNEL:
        tiles = tl.cdiv(channels, CHANNELS)
        c = (pid % tiles) * CHANNELS + tl.arange(0, CHANNELS)
        split = pid // tiles
        step = tl.load(step_ptr + c, mask=c < channels, other=1.0)[None, :]
        if OFFSET:
            offset = tl.load(offset_ptr + c, mask=c < channels, other=0.0)
            offset = offset[None, :].to(tl.float32)
        in_step = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
        in_offset = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    else:
        split = pid
        step = tl.load(step_ptr)
        if OFFSET:
            offset = tl.load(offset_ptr).to(tl.float32)
        in_step = tl.zeros([ROWS], dtype=tl.float32)
        in_offset = tl.zeros([ROWS], dtype=tl.float32)
    step = step.to(tl.float32)
    inverse = tl.div_rn(1.0, step)
    first = split
    if WIDE:
        first = first.to(tl.int64)
    first = first * repeats * ROWS
    i = 0
    while i < repeats:  # the interpreter cannot count to a tensor
        m = first + i * ROWS + tl.arange(0, ROWS)
        if PER_CHANNEL:
            places = ((m // inner) * (channels * inner) + m % inner)[
                :, None
            ] + (c * inner)[None, :]
            mask = (m < rows)[:, None] & (c < channels)[None, :]
        else:
            places = m
            mask = m < rows
        grad = tl.load(grad_ptr + places, mask=mask, other=0.0)
        x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
        if OFFSET:
            x = x - offset
        v = quotient(x, step, inverse, QMIN, QMAX)
        inside = (v > QMIN) & (v < QMAX)
        tl.store(
            grad_x_ptr + places,
            tl.where(inside, grad, 0.0).to(grad_x_ptr.dtype.element_ty),
            mask=mask,
        )
        grad = grad.to(tl.float32)
        clipped = clip(v, QMIN * 1.0, QMAX * 1.0)
        rounded = (clipped + ROUND) - ROUND
        in_step += grad * tl.where(inside, rounded - v, clipped)
        if OFFSET:
            in_offset += tl.where(inside, 0.0, grad)
        i += 1
    if PER_CHANNEL:
        out = partial_ptr + split * channels + c
        tl.store(out, tl.sum(in_step, 0) * scale, mask=c < channels)
        if OFFSET:
            tl.store(
                out + splits * channels,
                tl.sum(in_offset, 0) * scale,
                mask=c < channels,
            )
    else:
        tl.store(partial_ptr + split, tl.sum(in_step, 0) * scale)
        if OFFSET:
            tl.store(
                partial_ptr + splits + split, tl.sum(in_offset, 0) * scale
            )
