"""Triton kernels of a max pooling; see :mod:`.max_pool`.

Feature maps are (N, H, W, C) in memory. Windows have KH x KW pixels and begin
SH, SW apart, the first of them PH, PW before the map. An image has OH x OW of
them.
"""

import triton
import triton.language as tl

from .lsq_triton import place


@triton.jit
def spots(block, rows, HEIGHT, WIDTH, ROWS: tl.constexpr):
    """Image, height and width of each row of a tile, where an image has
    HEIGHT x WIDTH rows; and whether there is such a row."""
    row = block * ROWS + tl.arange(0, ROWS)
    n, y = row // (HEIGHT * WIDTH), row // WIDTH % HEIGHT
    return n, y, row % WIDTH, row < rows


@triton.jit
def pixels(n, h, w, c, exists, C, HEIGHT, WIDTH):
    """Where pixels of a map lie, and which of them exist."""
    inside = exists & (h >= 0) & (h < HEIGHT) & (w >= 0) & (w < WIDTH)
    starts = ((n * HEIGHT + h) * WIDTH + w) * C
    mask = inside[:, None] & (c < C)[None, :]
    return starts[:, None] + c[None, :], mask


@triton.jit
def forward_kernel(
    x_ptr,
    out_ptr,
    place_ptr,
    rows,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Maxima, and the place of each in its window. A row is a window."""
    _, block, c = place(C, CHANNELS, 1, WIDE)
    n, y, x, exists = spots(block, rows, OH, OW, ROWS)
    top = y * SH - PH
    left = x * SW - PW
    best = tl.full([ROWS, CHANNELS], float('-inf'), dtype=tl.float32)
    # the first pixel of the map is the maximum where all of them are -inf
    first = tl.maximum(-top, 0) * KW + tl.maximum(-left, 0)
    found = tl.zeros([ROWS, CHANNELS], dtype=tl.int32)
    found += first.to(tl.int32)[:, None]
    for i in range(KH):
        for j in tl.static_range(KW):
            offsets, mask = pixels(n, top + i, left + j, c, exists, C, H, W)
            value = tl.load(x_ptr + offsets, mask=mask, other=float('-inf'))
            value = value.to(tl.float32)
            better = (value > best) | (value != value)
            best = tl.where(better, value, best)
            found = tl.where(better, i * KW + j, found)
    offsets, mask = pixels(n, y, x, c, exists, C, OH, OW)
    tl.store(out_ptr + offsets, best.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(place_ptr + offsets, found.to(tl.uint8), mask=mask)


@triton.jit
def backward_kernel(
    grad_ptr,
    place_ptr,
    grad_x_ptr,
    rows,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Gradient of the map. A row is a cell of SH x SW pixels, of which there
    are CELLS_H x CELLS_W with the padding: in it, which windows cover a pixel
    and at which place depends on nothing but where in the cell it is."""
    _, block, c = place(C, CHANNELS, 1, WIDE)
    n, y, x, exists = spots(block, rows, CELLS_H, CELLS_W, ROWS)
    for down in tl.static_range(SH):
        for right in tl.static_range(SW):
            total = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
            # from the first window to the last, as torch adds
            for i in range(KH - 1 - (KH - 1 - down) % SH, -1, -SH):
                for j in tl.static_range(KW - 1, -1, -1):
                    if j % SW == right:
                        offsets, mask = pixels(
                            n, y - i // SH, x - j // SW, c, exists, C, OH, OW
                        )  # fmt: skip
                        found = tl.load(place_ptr + offsets, mask=mask)
                        grad = tl.load(grad_ptr + offsets, mask=mask, other=0)
                        is_here = found.to(tl.int32) == i * KW + j
                        grad = grad.to(tl.float32)
                        total += tl.where(is_here, grad, 0.0)
            offsets, mask = pixels(
                n, y * SH + down - PH, x * SW + right - PW, c, exists, C, H, W
            )  # fmt: skip
            total = total.to(grad_x_ptr.dtype.element_ty)
            tl.store(grad_x_ptr + offsets, total, mask=mask)
